"""Swaps that are refused change nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import write_model
from instep.streaming.replaying import WarmUpReplay
from instep_client import AsyncClient, InvalidInput, Refused
from instep_client.protocol.wire import Code
from tests.support.models import whole
from tests.support.running import running
from tests.support.swapping import DEEPER, EXACT, KEPT, WIDER, A, replayed_truth
from tests.support.swapping import folder as folder
from tests.support.swapping import recordings as recordings


async def test_a_replay_that_takes_long_fails_only_while_frames_arrive(
    folder: Path, recordings: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(folder, DEEPER, overwrite=True)
    x = rng.standard_normal((60_000, 5)).astype(np.float32)
    follow = WarmUpReplay.follow

    def takes_long(replay: WarmUpReplay) -> int:
        time.sleep(0.6)
        return follow(replay)

    monkeypatch.setattr(WarmUpReplay, "follow", takes_long)
    async with running(A, recording={"file": recordings}, engine=EXACT) as server:
        async with AsyncClient(server.endpoint) as client, AsyncClient(server.endpoint) as operator:
            stream = await client.open("s")
            swapping = asyncio.create_task(operator.swap_model("ears", folder, "replay:6"))
            while not swapping.done():
                await stream.step(x[stream.next_seq])
            with pytest.raises(Refused, match="its frames arrive as quickly as they are replayed"):
                await swapping
            moved_at = stream.next_seq
            await operator.swap_model("ears", folder, "replay:6")
            y = await stream.step(x[moved_at : moved_at + 5])
            np.testing.assert_array_equal(y, replayed_truth(x[: moved_at + 5], moved_at - 6, moved_at)[moved_at:])


async def test_a_version_that_has_no_room_for_the_streams_leaves_the_counters_as_they_are(
    folder: Path, recordings: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((3, 5)).astype(np.float32)
    engine, transport = {**EXACT, "max_streams": 2}, {"heartbeat_s": 0.5}
    async with running(A, recording={"file": recordings}, engine=engine, transport=transport) as server:
        async with AsyncClient(server.endpoint) as former:
            for name in ("a", "b"):
                await (await former.open(name)).step(x)
            await former.close(park=True)
        while server.default.numbers()["streams_parked"] < 2:
            await asyncio.sleep(0.01)
        async with AsyncClient(server.endpoint) as client:
            for name in ("c", "d"):  # a and b hibernate
                await (await client.open(name)).step(x)
            with pytest.raises(Refused, match="there is room in memory for 0: use `--streams keep`"):
                await client.swap_model("ears", folder, "move")
            numbers = await client.stats()
    assert numbers["received_frames_total"] == numbers["frames_total"] == 12


async def test_a_version_that_cannot_be_served_changes_nothing(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((20, 5)).astype(np.float32)
    write_model(tmp_path / "same", A)
    write_model(tmp_path / "wider", WIDER)
    write_model(tmp_path / "deeper", DEEPER)
    (tmp_path / "broken").mkdir()
    async with running(A, engine=EXACT) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        first = await stream.step(x[:10])
        for name, path, code, words in (
            ("ears", tmp_path / "broken", Code.NOT_LOADED, "is not a model folder"),
            ("ears", tmp_path / "same", Code.NOT_LOADED, "holds the version of 'ears' that is served already"),
            (
                "ears",
                tmp_path / "wider",
                Code.NOT_LOADED,
                "number of outputs differs from that of the version that is served (16 instead of 8), so no "
                "stream can be moved to it: use `--streams keep`, or `model.on_reload: keep`",
            ),
            (
                "ears",
                tmp_path / "deeper",
                Code.NOT_LOADED,
                "its state differs from that of the version that is served, so no stream can be moved to it: use "
                "`--streams replay:N` or `keep`, or `model.on_reload: replay:N` or `keep`",
            ),
            ("eyes", folder, Code.UNKNOWN_MODEL, "it serves 'ears'"),
        ):
            with pytest.raises(Refused) as refused:
                await client.swap_model(name, path, "move")
            assert (refused.value.code, words in refused.value.sentence) == (code, True), refused.value.sentence
        cure = r"use `--streams move` or `keep`, or `model\.on_reload: move` or `keep`$"
        with pytest.raises(Refused, match=f"frames are replayed from a recording.* {cure}"):
            await client.swap_model("ears", folder, "replay:9")
        for policy in ("replay", "replay:0", "replay:x", "move:1", "kept"):
            with pytest.raises(InvalidInput, match="expected keep, move or replay:N"):
                await client.swap_model("ears", folder, policy)
        second = await stream.step(x[10:])
        assert client.info.fingerprint == A.fingerprint
        await client.swap_model("ears", folder)
        async with AsyncClient(server.endpoint):  # so that no version is unloaded
            await client.swap_model("ears", tmp_path / "same")
            for name, words in (
                (KEPT, "is a former version"),
                ("ears", "connections or streams left from an earlier swap"),
            ):
                with pytest.raises(Refused, match=words):
                    await client.swap_model(name, folder)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole(A, x)[0])
