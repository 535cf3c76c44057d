"""Swaps that are refused change nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import write_model
from instep.replay.warm_up import WarmUpReplay
from instep_client import AsyncClient
from tests.support.models import whole
from tests.support.running import running
from tests.support.swapping import DEEPER, EXACT, WIDER, A, reload_models, replayed_truth
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
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("s")
            swapping = asyncio.create_task(reload_models(server, folder, "replay:6"))
            while not swapping.done():
                await stream.step(x[stream.next_seq])
            assert "its frames arrive as quickly as they are replayed" in await swapping
            moved_at = stream.next_seq
            assert not await reload_models(server, folder, "replay:6")
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
            assert "there is room in memory for 0" in await reload_models(server, folder, "move")
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
        for path, policy, words in (
            (tmp_path / "broken", "move", "is not a model folder"),
            (tmp_path / "wider", "move", "allow_other_sizes"),
            (tmp_path / "deeper", "move", "its state differs"),
            (folder, "replay:9", "frames are replayed from a recording"),
        ):
            assert words in await reload_models(server, path, policy)
        second = await stream.step(x[10:])
        assert client.info.fingerprint == A.fingerprint
        assert not await reload_models(server, folder)
        async with AsyncClient(server.endpoint):  # so that no version is unloaded
            assert not await reload_models(server, tmp_path / "same")
            assert "connections or streams left" in await reload_models(server, folder)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole(A, x)[0])
