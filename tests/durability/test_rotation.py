"""A crash, a loss of power or a fault of the disk at any point while a recording goes on in another file."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from instep.server.recovery import go_on

from instep.recording import family
from instep.recording.errors import RecordingError
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import Kind
from tests.support.disk import Disk, Fault, Operation, after_power_loss
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.story import FEATURES, Story, assert_restored, new_engine, story_header

SEED = 5


def restore(base: Path, story: Story, moment: int | None = None) -> tuple[RecordingWriter, int]:
    """Go on with what is there, and hold the engine against the truth about that moment, its newest position."""
    table, rings, stepper = new_engine()
    newest, header = family.members(base)[-1].path, family.members(base)[-1].header
    position = moment or header.first_position - 1 + inspect(newest, lambda _: None).positions
    writer, _ = go_on(base, story_header(), table, rings, stepper, accept_numerics_change=False)
    assert writer.path == newest
    assert_restored(table, rings, stepper, story.truth(position))
    assert not list(base.parent.glob("*-new*")), "what a crash left was not removed"
    return writer, position


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(str(tmp_path), several=True)
    disk.mount(monkeypatch)
    yield disk
    disk.close()


def begun(folder: Path) -> Story:
    """Some life, all of it committed, and streams open."""
    folder.mkdir()
    story = Story(RecordingWriter.create(folder / "r.db", story_header()), seed=SEED)
    story.tell(20)
    assert story._open()
    return story


def test_after_a_crash_before_anything_that_a_rotation_does_to_the_disk_there_is_one_file_to_go_on_with(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live"
    story = begun(live)
    images: list[tuple[str, Path]] = []

    def on_operation(operation: Operation) -> Fault | None:
        image = tmp_path / f"image-{len(images)}"
        shutil.copytree(live, image)
        images.append((f"{operation.verb} {operation.file}", image))
        return None

    disk.on_operation = on_operation
    story.rotate()
    story.tell(1)
    disk.on_operation = lambda operation: None
    story.writer.abandon()
    monkeypatch.undo()
    verbs = {what.split()[0] for what, _ in images}
    assert verbs >= {"create", "write", "sync", "rename"}
    newest = []
    for _, image in images:
        files = family.members(image / "r.db")
        for older in files[:-1]:
            with RecordingReader(older.path) as reader:
                assert reader.followed_by == "r-000002.db", "the old file was not sealed before the new one was there"
        writer, moment = restore(image / "r.db", story)
        newest.append(writer.path.name)
        writer.close()
        restore(image / "r.db", story, moment)[0].close()
    renamed = [what for what, _ in images].index("rename r-000002.db-new")
    assert set(newest[: renamed + 1]) == {"r.db"}
    assert set(newest[renamed + 1 :]) == {"r-000002.db"}


# SQLite goes on with other calls after the first that failed, and the wrapper has no place to raise what those say.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ["full", "broken"])
def test_after_a_fault_of_the_disk_anywhere_in_a_rotation_nothing_that_was_committed_is_lost(
    tmp_path: Path, disk: Disk, fault: Fault
) -> None:
    refused = 0
    for after in range(1000):
        folder = tmp_path / str(after)
        story = begun(folder)
        left = after

        def on_operation(operation: Operation) -> Fault | None:
            nonlocal left
            left -= 1
            return fault if left < 0 else None

        disk.on_operation = on_operation
        committed = story.writer.position
        try:
            story.rotate()
        except (RecordingError, OSError, sqlite3.Error):
            refused += 1
            story.writer.abandon()
            disk.on_operation = lambda operation: None
            writer, position = restore(folder / "r.db", story)
            assert position >= committed
            writer.close()
        else:
            disk.on_operation = lambda operation: None
            story.writer.close()
            if left >= 0:
                break
    assert refused > 20


@pytest.mark.parametrize("durability", ["commit", "fsync"])
def test_after_a_loss_of_power_around_rotations_nothing_reported_at_fsync_is_lost(
    tmp_path: Path, disk: Disk, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = story_header(durability)  # type: ignore[arg-type]
    live = tmp_path / "live"
    live.mkdir()
    story = Story(RecordingWriter.create(live / "r.db", header), seed=SEED + 1)
    began = len(disk.operations)
    for number in range(16):
        story.tell(1)
        disk.mark(story.writer.position)
        if number % 5 == 4:
            story.rotate()
    story.writer.close()
    disk.mark(story.writer.position)
    operations = disk.operations
    monkeypatch.undo()
    rng = np.random.default_rng(11)
    newest = set()
    for number in range(60):
        crash = int(rng.integers(began, len(operations) + 1))
        image = tmp_path / f"image-{number}"
        image.mkdir()
        for name, contents in after_power_loss(operations[:crash], rng).items():
            (image / name).write_bytes(contents)
        writer, position = restore(image / "r.db", story)
        reported = max((op.offset for op in operations[:crash] if op.verb == "mark"), default=0)
        if durability == "fsync":
            assert position >= reported, f"crash {number}, before operation {crash}"
        newest.add(writer.path.name)
        writer.abandon()
    assert newest == {"r.db", "r-000002.db", "r-000003.db", "r-000004.db"}


async def test_a_server_whose_disk_is_full_as_its_recording_goes_on_ends_and_a_restart_has_all_that_was_answered(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.db"
    disk.on_operation = lambda operation: "full" if operation.file.startswith("r-000003") else None
    recording = {"file": path, "max_age_s": 1e-6}
    x = np.random.default_rng(2).standard_normal((400, 1, FEATURES)).astype(np.float32)
    answered = 0
    failure = f"the recording {path} failed: database or disk is full"
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s")
        while True:
            reply = await client.step(opened.handles(), [answered], x[answered : answered + 1], [answered])
            if reply.kind is not Kind.STEPPED or reply.failures():
                break
            answered += 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith("r-000003")]
    monkeypatch.undo()
    async with running(SMALL, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(["s"], [answered], opened.epochs())
        assert resumed.codes() == []
        (seq,) = resumed.seqs()
        assert seq >= answered
        reply = await client.step(resumed.handles(), [answered], x[answered : answered + 2], [answered])
        truth, _ = whole(SMALL, x[: answered + 2, 0])
        np.testing.assert_array_equal(reply.floats().reshape(2, -1), truth[answered:])
