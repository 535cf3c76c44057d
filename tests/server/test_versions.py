"""A start on the recordings of earlier versions: whose streams continue where."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep.server.moves import Moved
from instep.server.preparation import CannotServe
from instep.server.recordings import recording_header
from instep.streaming.service import ModelService
from instep_client import AsyncClient
from tests.support.models import whole
from tests.support.running import config, prepared, running
from tests.support.swapping import (
    DEEPER,
    EXACT,
    KEPT,
    WIDER,
    A,
    B,
    assert_each_verifies_with_its_version,
    reload_models,
    truth,
)
from tests.support.swapping import folder as folder
from tests.support.swapping import recordings as recordings

FRAMES = 30


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The former version."""
    write_model(tmp_path / "old", A)
    return tmp_path / "old"


@pytest.fixture
def x(rng: np.random.Generator) -> F32:
    return rng.standard_normal((FRAMES, 5)).astype(np.float32)


def sections(recordings: Path, on_reload: str = "move", **model: Any) -> dict[str, Any]:
    return {"recording": {"path": recordings}, "engine": EXACT, "model": {"on_reload": on_reload, **model}}


async def record(old: Path, recordings: Path, x: F32, *, crashes: bool = False) -> None:
    """Serve the former version, which steps ten frames of "s" and gets no further; "unused" gets none."""
    async with running(A, folder=old, **sections(recordings)) as server, AsyncClient(server.endpoint) as client:
        await (await client.open("s")).step(x[:10])
        await client.open("unused")
        if crashes:
            server.stop(drain=False)  # no checkpoint is taken
        else:
            await client.close(park=True)


async def steps_on(endpoint: str, x: F32, model: str = "") -> F32:
    """The outputs of the frames of "s" from the tenth on."""
    async with AsyncClient(endpoint, model=model) as client:
        stream = await client.resume("s", have=10, take_over=True)
        assert stream.next_seq == 10
        y = await stream.step(x[10:])
        await client.close(park=True)
        return y


def said(told: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in told if line["event"] == event]


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize(("policy", "version"), [("move", B), ("replay:6", DEEPER)])
async def test_streams_continue_in_the_version_that_is_configured_while_the_server_is_stopped(
    old: Path, folder: Path, recordings: Path, x: F32, policy: str, version: Model, crashes: bool
) -> None:
    await record(old, recordings, x, crashes=crashes)
    left = recordings / "ears@2.instep"  # by a server that was killed while it created the file
    if crashes:
        left.touch()
    else:
        RecordingWriter.create(left, recording_header(prepared(WIDER), config(recording={"path": left}))).abandon()
    write_model(folder, version, overwrite=True)
    async with running(version, folder=folder, **sections(recordings, policy)) as server:
        y = await steps_on(server.endpoint, x)
        async with AsyncClient(server.endpoint) as client:
            unused = await client.resume("unused", have=0, take_over=True)
            np.testing.assert_array_equal(await unused.step(x), whole(version, x)[0])
            await client.close(park=True)
        assert len(server.services) == 1
    if policy == "move":
        np.testing.assert_array_equal(y, truth(x, 10)[10:])
    else:
        np.testing.assert_array_equal(y, whole(version, x[4:])[0][6:])
    assert_each_verifies_with_its_version(recordings, folder)
    async with (
        running(version, folder=folder, **sections(recordings)) as server,
        AsyncClient(server.endpoint) as client,
    ):
        assert {each.name: each.next_seq for each in await client.list_streams()}.keys() == {"s", "unused"}


@pytest.mark.parametrize("crashes", [False, True])
async def test_kept_streams_have_their_version_after_a_restart_too(
    old: Path, folder: Path, recordings: Path, x: F32, crashes: bool
) -> None:
    await record(old, recordings, x, crashes=crashes)
    for _ in range(2):
        async with running(B, folder=folder, **sections(recordings, "keep")) as server:
            assert [service.name for service in server.services] == ["ears", KEPT]
            async with AsyncClient(server.endpoint) as client:
                assert client.info.fingerprint == B.fingerprint
    async with running(B, folder=folder, **sections(recordings, "keep")) as server:
        np.testing.assert_array_equal(await steps_on(server.endpoint, x, KEPT), whole(A, x)[0][10:])
    async with running(B, folder=folder, **sections(recordings, "move")) as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.resume("s", have=FRAMES, take_over=True)
            np.testing.assert_array_equal(await stream.step(x), truth(np.concatenate([x, x]), FRAMES)[FRAMES:])


async def test_kept_streams_of_all_recordings_of_a_version_are_served(
    old: Path, folder: Path, recordings: Path, x: F32
) -> None:
    async with running(A, folder=old, **sections(recordings)) as server:
        for name in ("s", "t"):
            async with AsyncClient(server.endpoint) as client:
                await (await client.open(name)).step(x[:10])
                await client.close(park=True)
            if name == "s":
                for version in (folder, old):
                    assert not await reload_models(server, version, "keep")
    for seen in (10, 20):
        async with (
            running(B, folder=folder, **sections(recordings, "keep")) as server,
            AsyncClient(server.endpoint, model=KEPT) as client,
        ):
            for name in ("s", "t"):
                stream = await client.resume(name, have=seen, take_over=True)
                y = await stream.step(x[seen : seen + 10])
                np.testing.assert_array_equal(y, whole(A, x)[0][seen : seen + 10])
            await client.close(park=True)


async def test_a_server_that_was_killed_before_it_ended_the_streams_that_moved_serves_each_once(
    old: Path, folder: Path, recordings: Path, x: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end_nothing(moved: Moved, former: ModelService, latter: ModelService) -> None:
        await latter.engine.journal.committed(moved.lsn)

    with monkeypatch.context() as patch:
        patch.setattr(Moved, "end", end_nothing)
        async with running(A, folder=old, **sections(recordings)) as server, AsyncClient(server.endpoint) as client:
            stream = await client.open("s")
            y = [await stream.step(x[:10])]
            assert not await reload_models(server, folder, "move")
            y.append(await stream.step(x[10:20]))
            server.stop(drain=False)
    told: list[dict[str, Any]] = []
    async with running(B, folder=folder, told=told, **sections(recordings)) as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.resume("s", have=20, take_over=True)
            y.append(await stream.step(x[20:]))
    np.testing.assert_array_equal(np.concatenate(y), truth(x, 10))
    assert not said(told, "moved")
    with RecordingReader(recordings / "ears.instep") as reader:
        assert [(each.name, each.reason) for each in reader.streams()] == [("s", "moved")]
    assert_each_verifies_with_its_version(recordings, folder)


@pytest.mark.parametrize("policy", ["move", "replay:6", "keep"])
@pytest.mark.parametrize("crashes", [False, True])
async def test_without_its_folder_a_former_version_gives_what_needs_no_step(
    old: Path, folder: Path, recordings: Path, x: F32, policy: str, crashes: bool
) -> None:
    await record(old, recordings, x, crashes=crashes)
    write_model(old, B, overwrite=True)
    told: list[dict[str, Any]] = []
    async with running(B, folder=folder, told=told, **sections(recordings, policy)) as server:
        continues = policy != "keep" and not crashes
        assert server.default.numbers()["streams_hibernated"] == (2 if continues else 0)
        lines = said(told, "streams not served")
        assert [Path(line["file"]).name for line in lines] == ([] if continues else ["ears.instep"])
        if not continues:
            assert f"{old} holds another version of the model now" in lines[0]["reason"]


async def test_streams_whose_names_are_taken_and_damaged_files_are_left_and_told(
    old: Path, folder: Path, recordings: Path, x: F32
) -> None:
    await record(old, recordings, x)
    async with running(B, folder=folder, **sections(recordings, "keep")) as server:
        async with AsyncClient(server.endpoint) as client:
            await (await client.open("s")).step(x[:10])
            await client.close(park=True)
    for _ in range(2):
        told: list[dict[str, Any]] = []
        async with running(B, folder=folder, told=told, **sections(recordings)) as server:
            assert server.default.numbers()["streams_hibernated"] == 2
            assert len(said(told, "streams not served")) == 1
    with closing(sqlite3.connect(recordings / "ears.instep")) as database, database:
        database.execute("UPDATE openings SET time_ns = time_ns + 1")
    async with running(B, folder=folder, told=(told := []), **sections(recordings)) as server:
        np.testing.assert_array_equal(await steps_on(server.endpoint, x), whole(B, x)[0][10:])
    (line,) = said(told, "streams not served")
    assert "ears.instep is damaged" in line["reason"]


async def test_versions_that_cannot_continue_are_refused(old: Path, recordings: Path, x: F32) -> None:
    await record(old, recordings, x)
    for version, setting in ((DEEPER, "on_reload"), (WIDER, "allow_other_sizes")):
        with pytest.raises(CannotServe, match=setting):
            async with running(replace(version, name="ears"), **sections(recordings)):
                pass
    with pytest.raises(CannotServe, match="on_reload"):
        async with running(replace(WIDER, name="ears"), **sections(recordings, allow_other_sizes=True)):
            pass
    async with running(replace(WIDER, name="ears"), **sections(recordings, "keep", allow_other_sizes=True)) as server:
        assert [service.name for service in server.services] == ["ears", KEPT]
        assert [service.about.outputs for service in server.services] == [16, 8]
