"""A model that is replaced by another version of it while its streams are live."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, closing
from pathlib import Path
from socket import create_server
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.models.model import Model
from instep.streaming.journal import Journal
from instep_client import AsyncClient, AsyncStream
from tests.support.models import whole
from tests.support.running import running
from tests.support.swapping import (
    DEEPER,
    EXACT,
    KEPT,
    A,
    B,
    assert_each_verifies_with_its_version,
    reload_models,
    replayed_truth,
    replays,
    truth,
)
from tests.support.swapping import folder as folder
from tests.support.swapping import recordings as recordings


@pytest.mark.parametrize(
    ("policy", "version"), [("move", B), pytest.param("replay:50", DEEPER, marks=pytest.mark.long)]
)
async def test_streams_lose_no_frame_and_each_frame_is_computed_by_the_version_of_its_seq(
    folder: Path, recordings: Path, rng: np.random.Generator, policy: str, version: Model
) -> None:
    write_model(folder, version, overwrite=True)
    x = rng.standard_normal((12, 4000, 5)).astype(np.float32)
    outputs: dict[int, list[F32]] = {number: [] for number in range(12)}
    streams: dict[int, AsyncStream] = {}
    with closing(create_server(("127.0.0.1", 0))) as probe:
        transport = {"endpoint": f"tcp://127.0.0.1:{probe.getsockname()[1]}"}
    sections: dict[str, Any] = {"recording": {"path": recordings}, "engine": EXACT, "transport": transport}
    is_over = asyncio.Event()

    async def in_lockstep(number: int) -> None:
        for frame in x[number]:
            outputs[number].append(await streams[number].step(frame))
            if is_over.is_set():
                return

    async def pipelined(number: int) -> None:
        async def send() -> None:
            for frame in x[number]:
                await streams[number].send(frame)
                if is_over.is_set():
                    break
            streams[number].finish()

        sending = asyncio.create_task(send())
        outputs[number] += [each async for each in streams[number]]
        await sending

    async with AsyncExitStack() as stack:
        async with running(A, **sections) as server:
            clients = [await stack.enter_async_context(AsyncClient(server.endpoint)) for _ in range(4)]
            for number in range(12):
                streams[number] = await clients[number % 3].open(f"s{number}")
            load = [
                asyncio.create_task(in_lockstep(number) if number % 2 else pipelined(number)) for number in range(12)
            ]
            await asyncio.sleep(0.3)
            assert not await reload_models(server, folder, policy)
            assert [each.name for each in await clients[3].list_models()] == ["ears"]
            await asyncio.sleep(0.3)
            is_over.set()
            await asyncio.gather(*load)
            firsts = replays(recordings / "ears@2.instep")
            assert len(firsts) == (12 if version is DEEPER else 0)

            def expected(number: int, frames: F32) -> F32:
                moved_at = streams[number].moved_at or 0
                if version is B:
                    return truth(frames, moved_at)
                return replayed_truth(frames, firsts[f"s{number}"], moved_at)

            for number, stream in streams.items():
                assert stream.moved_at is not None
                assert 0 < stream.moved_at < len(outputs[number]) == stream.next_seq
                assert firsts.get(f"s{number}", 0) <= max(0, stream.moved_at - 50)
                y = np.array(outputs[number])
                np.testing.assert_array_equal(y, expected(number, x[number, : stream.next_seq]))
            assert {client.info.fingerprint for client in clients} == {version.fingerprint}
            assert (await streams[1].read_state())[1]["h"].shape == ((2, 8) if version is DEEPER else (1, 8))
            numbers = await clients[0].stats()
            moved = sum(stream.next_seq - (stream.moved_at or 0) for stream in streams.values())
            assert numbers["frames_total"] == moved, "what the new version has computed"
            late = await clients[3].open("late")
            np.testing.assert_array_equal(await late.step(x[0, :9]), whole(version, x[0, :9])[0])
            assert late.moved_at is None
        async with running(version, **sections):  # clients resume by themselves
            for number in range(1, 12, 2):  # nothing more can be sent through the others
                first = streams[number].next_seq
                y = await streams[number].step(x[number, first : first + 5])
                np.testing.assert_array_equal(y, expected(number, x[number, : first + 5])[first:])
    assert_each_verifies_with_its_version(recordings, folder)


@pytest.mark.parametrize("policy", ["move", "replay:6"])
@pytest.mark.parametrize(("hibernate_after_s", "place"), [(0, "parked"), (0.1, "hibernating")])
async def test_streams_without_a_connection_move_too(
    folder: Path, recordings: Path, rng: np.random.Generator, hibernate_after_s: float, place: str, policy: str
) -> None:
    x = rng.standard_normal((30, 5)).astype(np.float32)
    if policy != "move":
        write_model(folder, DEEPER, overwrite=True)
    limits, transport = {"hibernate_after_s": hibernate_after_s}, {"heartbeat_s": 0.5}
    sections: dict[str, Any] = {"recording": {"path": recordings}, "limits": limits, "engine": EXACT}
    async with running(A, transport=transport, **sections) as server, AsyncClient(server.endpoint) as client:
        async with AsyncClient(server.endpoint) as gone:
            first = await (await gone.open("s")).step(x[:10])
            await gone.close(park=True)
        while [each.place for each in await client.list_streams()] != [place]:
            await asyncio.sleep(0.01)
        assert not await reload_models(server, folder, policy)
        stream = await client.resume("s", have=10, take_over=True)
        y = np.concatenate([first, await stream.step(x[10:])])
        np.testing.assert_array_equal(y, truth(x, 10) if policy == "move" else replayed_truth(x, 4, 10))


async def test_a_stream_that_falls_asleep_while_the_recording_is_committed_moves_too(
    folder: Path, recordings: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((20, 5)).astype(np.float32)
    async with (
        running(A, recording={"path": recordings}, engine=EXACT) as server,
        AsyncClient(server.endpoint) as client,
    ):
        stream = await client.open("s")
        first = await stream.step(x[:10])
        committed, hibernation = Journal.committed, server.default.operations.hibernation

        async def slowly(journal: Journal, lsn: int) -> None:
            monkeypatch.setattr(Journal, "committed", committed)
            await committed(journal, lsn)
            limits = server.config.limits.model_copy(update={"hibernate_after_s": 0.1})
            server.configure(server.config.model_copy(update={"limits": limits}))
            while not hibernation:
                await asyncio.sleep(0.01)

        monkeypatch.setattr(Journal, "committed", slowly)
        assert not await reload_models(server, folder, "move")
        assert Journal.committed is committed
        assert stream.moved_at == 10
        np.testing.assert_array_equal(np.concatenate([first, await stream.step(x[10:])]), truth(x, 10))


async def test_kept_streams_stay_with_their_version_until_nobody_uses_it_any_more(
    folder: Path, recordings: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((40, 5)).astype(np.float32)
    told: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"transport": {"heartbeat_s": 1000}}
    async with running(A, told=told, recording={"path": recordings}, engine=EXACT, **settings) as server:
        async with AsyncClient(server.endpoint) as operator:
            async with AsyncClient(server.endpoint) as old:
                stream = await old.open("s")
                first = await stream.step(x[:20])
                assert not await reload_models(server, folder)
                assert [each.name for each in await operator.list_models()] == ["ears", KEPT]
                async with AsyncClient(server.endpoint, model="ears") as new:
                    assert new.info.fingerprint == B.fingerprint
                    fresh = await new.open("s")  # another stream: the versions know nothing of each other
                    np.testing.assert_array_equal(await fresh.step(x), whole(B, x)[0])
                swapped_at = [line["event"] for line in told].index("swapped")
                second = await stream.step(x[20:])
                assert stream.moved_at is None
            np.testing.assert_array_equal(np.concatenate([first, second]), whole(A, x)[0])
        async with AsyncClient(server.endpoint) as operator:
            while [each.name for each in await operator.list_models()] != ["ears"]:
                await asyncio.sleep(0.02)
    assert [line["event"] for line in told if line["event"] in ("swapped", "unloaded")] == ["swapped", "unloaded"]
    assert told[swapped_at]["kept_as"] == KEPT
    assert_each_verifies_with_its_version(recordings, folder)


async def test_a_reset_begins_a_replay_and_closed_streams_are_in_nobodys_way(
    folder: Path, recordings: Path, rng: np.random.Generator
) -> None:
    write_model(folder, DEEPER, overwrite=True)
    x = rng.standard_normal((6, 300, 5)).astype(np.float32)
    sections: dict[str, Any] = {"recording": {"path": recordings}, "engine": {**EXACT, "max_streams": 4}}
    async with running(A, **sections) as server, AsyncClient(server.endpoint) as client:
        for number in (0, 1, 2, 3):  # their slots are taken by later ones
            gone = await client.open(f"gone{number}")
            await gone.step(x[number, :50])
            await gone.close()
        often, once, empty = [await client.open(name) for name in ("often", "once", "empty")]
        await often.step(x[4, :100])
        await often.reset()
        await once.step(x[5, :20])
        await often.step(x[4, 100:130])
        copy = await once.fork("copy")
        await copy.step(x[5, 20:40])
        assert not await reload_models(server, folder, "replay:100")
        for stream, which, first, at in ((often, 4, 100, 130), (once, 5, 0, 20), (copy, 5, 20, 40), (empty, 3, 0, 0)):
            assert stream.moved_at == at
            y = await stream.step(x[which, at:])
            np.testing.assert_array_equal(y, whole(DEEPER, x[which, first:])[0][at - first :])
    assert replays(recordings / "ears@2.instep") == {"often": 100, "once": 0, "copy": 20, "empty": 0}
    assert_each_verifies_with_its_version(recordings, folder)


async def test_a_version_that_cannot_be_served_changes_nothing(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((20, 5)).astype(np.float32)
    write_model(tmp_path / "deeper", DEEPER)
    async with running(A, engine=EXACT) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        first = await stream.step(x[:10])
        assert "state" in await reload_models(server, tmp_path / "deeper", "move")
        assert "recording" in await reload_models(server, folder, "replay:9")
        second = await stream.step(x[10:])
        assert client.info.fingerprint == A.fingerprint
    np.testing.assert_array_equal(np.concatenate([first, second]), whole(A, x)[0])
    async with running(A, engine=EXACT, recording={"path": tmp_path / "r.instep"}) as server:
        assert "recording.path" in await reload_models(server, folder)
