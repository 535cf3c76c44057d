"""A recording whose writer dies while it is made: a start under the same name begins anew, or goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep.recording.database import holds_recording
from instep.recording.reader import RecordingReader
from instep.recording.schema import Durability
from instep.recording.writer import RecordingWriter
from tests.support.disk import Disk, Operation, after_power_loss, lay_out, written
from tests.support.models import SMALL
from tests.support.running import running
from tests.support.story import story_header

LOSSES = 60


@pytest.fixture(scope="module", params=["fsync", "commit"])
def creation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Durability, list[Operation]]:
    """All that reaches the disk until an empty recording is there."""
    durability: Durability = request.param
    disk = Disk(f"creation-{durability}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("instep.recording.writer.sqlite3", disk)
        writer = RecordingWriter.create(tmp_path_factory.mktemp(durability) / "r.instep", story_header(durability))
        operations = list(disk.operations)
        writer.abandon()
    disk.close()
    return durability, operations


def starts(folder: Path, files: dict[str, bytes], durability: Durability) -> str:
    """Start as a server does; whether it began anew or went on."""
    path = lay_out(folder, files)
    if holds_recording(path):
        writer, how = RecordingWriter.resume(path, story_header(durability)), "went on"
    else:
        writer, how = RecordingWriter.create(path, story_header(durability)), "began"
    writer.event(1, "note", None, "")
    writer.close()
    with RecordingReader(path) as reader:
        reader.check_positions()
        assert reader.finished
        assert reader.last_position == (3 if how == "went on" else 2)
    return how


def test_a_writer_that_was_killed_while_it_made_a_recording(
    creation: tuple[Durability, list[Operation]], tmp_path: Path
) -> None:
    durability, operations = creation
    found = [
        starts(tmp_path / str(crash), written(operations[:crash]), durability) for crash in range(len(operations) + 1)
    ]
    assert found[0] == "began"
    assert found[-1] == "went on"


def test_power_that_was_lost_while_a_recording_was_made(
    creation: tuple[Durability, list[Operation]], tmp_path: Path
) -> None:
    durability, operations = creation
    rng = np.random.default_rng(5)
    found = []
    for loss in range(LOSSES):
        files = after_power_loss(operations[: int(rng.integers(len(operations) + 1))], rng)
        found.append(starts(tmp_path / str(loss), files, durability))
    assert set(found) == {"began", "went on"}


async def test_a_server_begins_anew_where_one_was_killed_before_its_recording_was_made(
    creation: tuple[Durability, list[Operation]], tmp_path: Path
) -> None:
    _, operations = creation
    half = next(at for at, operation in enumerate(operations) if operation.verb == "write" and not operation.file) + 2
    files = written(operations[:half])
    assert files[""], "part of the file is there"
    path = lay_out(tmp_path, files)
    async with running(SMALL, recording={"path": path}):
        pass
    with RecordingReader(path) as reader:
        assert reader.finished
