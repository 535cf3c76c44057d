"""Damage anywhere: what is read is what was written, or an error that names the file; never anything else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.recording.database import DatabaseLimits
from instep.recording.errors import RecordingError
from instep.recording.inspection import Inspection, inspect
from instep.recording.recovery import Recovered
from instep.recording.schema import owner_detail
from instep.recording.writer import RecordingWriter
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.rows import stream_event
from tests.support.scribe import Scribe

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))
FLIPS = 900


def observe(path: Path) -> list[Any]:
    """Everything an engine would go on with, and everything `check` counts."""
    found: list[Any] = []
    with Recovered(path) as recovered:
        for stream in recovered.load(recovered.names):
            arrays = (stream.state, stream.tail_x, stream.tail_y)
            found.append([None if array is None else array.tobytes() for array in arrays])
            found.append((stream.stream, stream.name, stream.epoch, stream.first_seq, stream.seq, stream.tail_seq))
        found.append(
            (recovered.last_stream, recovered.last_epoch, recovered.last_position, recovered.checkpoint_position)
        )
        for portion in recovered.portions():
            found += [(mark.position, mark.stream) for mark in portion.marks]
            frames = portion.frames
            columns = (frames.streams, frames.seqs, frames.x, frames.y, frames.answered)
            found += frames.positions.tolist()
            found.append([column.tobytes() for column in columns])
    return found


def scribble(path: Path, commits: list[list[Any]] | None = None) -> RecordingWriter:
    """Some of everything, committed in many pieces; what was observable after each goes into `commits`."""
    small = DatabaseLimits(page_bytes=1024)  # more pages, more of them inside trees
    writer = RecordingWriter.create(path, HEADER, limits=small)
    scribe = Scribe(writer, gru_step(GRU))

    def commit() -> None:
        writer.commit()
        if commits is not None:
            commits.append(observe(path))

    for stream in range(1, 7):
        scribe.open(stream, scribe.random_state() if stream % 2 else None, first_seq=10 * (stream == 3))
    commit()
    for turn in range(20):
        batch = scribe.step([1, 2, 3], "failed" if turn == 3 else "computed")
        through = scribe.step([5, 6, 1])
        if turn == 5:
            scribe.reset(2, scribe.random_state())
            scribe.close(4)
            scribe.open(7, name="late")
            stream_event(writer, scribe.now, "owner", 3, 7000, owner_detail(1003, 16))
        if turn in (6, 12):
            scribe.checkpoint(through)
        assert through > batch
        commit()
    scribe.step([7, 1], "unanswered")
    commit()
    return writer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.rec"
    scribble(path).close()
    return path


def outcome(path: Path) -> tuple[list[Any], Inspection] | None:
    """None where it was refused."""
    try:
        return observe(path), inspect(path)
    except RecordingError as error:
        refusal = str(error)
    assert str(path) in refusal
    return None


@pytest.mark.long
def test_a_byte_of_another_value_changes_nothing_or_is_refused(whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    content = np.frombuffer(whole.read_bytes(), np.uint8)
    right = outcome(whole)
    assert right is not None
    used = np.flatnonzero(content)
    places = np.concatenate([rng.choice(len(content), FLIPS // 3), rng.choice(used, FLIPS - FLIPS // 3)])
    refused = 0
    for place in places.tolist():
        damaged = content.copy()
        damaged[place] ^= rng.integers(1, 256, dtype=np.uint8)
        (tmp_path / "b.rec").write_bytes(damaged.tobytes())
        found = outcome(tmp_path / "b.rec")
        refused += found is None
        assert found in (None, right), f"byte {place}"
    assert FLIPS // 2 < refused < FLIPS


def test_a_file_that_was_cut_off_is_refused(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    for length in [*range(0, len(content), len(content) // 60), len(content) - 1]:
        (tmp_path / "b.rec").write_bytes(content[:length])
        assert outcome(tmp_path / "b.rec") is None, f"{length} bytes"


def test_a_damaged_or_cut_off_wal_ends_at_one_of_the_commits(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    commits: list[list[Any]] = []
    writer = scribble(path, commits)
    shutil.copyfile(path, tmp_path / "b.rec")
    wal = Path(f"{path}-wal").read_bytes()
    writer.abandon()
    empty: list[Any] = [(0, 0, 0, 0)]
    assert len(wal) > 20 * 1024
    rng = np.random.default_rng(2)
    damaged = Path(f"{tmp_path / 'b.rec'}-wal")
    reached = set()
    for at in range(120):
        place = int(rng.integers(len(wal)))
        if at % 2:
            damaged.write_bytes(wal[:place])
        else:
            damaged.write_bytes(wal[:place] + bytes([wal[place] ^ 0x55]) + wal[place + 1 :])
        Path(f"{tmp_path / 'b.rec'}-shm").unlink(missing_ok=True)
        found = observe(tmp_path / "b.rec")
        assert found in [empty, *commits], f"byte {place}"
        reached.add(len(found))
    assert len(reached) > 10
