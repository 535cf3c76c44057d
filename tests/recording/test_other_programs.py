"""Other programs that write, move, lock or read the file of a recording that is being written."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from instep.recording.database import DatabaseLimits
from instep.recording.errors import DamagedRecording, RecordingError, UnavailableRecording
from instep.recording.lock import lock_path
from instep.recording.reader import RecordingReader
from instep.recording.recorder import Recorder
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.rows import open_stream

HEADER = make_header(gru_description(make_gru(3, 4)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.rec"


@pytest.fixture
def writer(path: Path) -> Iterator[RecordingWriter]:
    limits = DatabaseLimits(wal_bytes=100_000, most_wal_bytes=2_000_000)
    writer = RecordingWriter.create(path, HEADER, limits=limits)
    open_stream(writer, 1, "a", 7, 0, 1, None)
    writer.commit()
    yield writer
    writer.abandon()


def add_batch(writer: RecordingWriter, seq: int, width: int = 3) -> None:
    position = writer.add_inputs(
        1, np.array([1], np.uint32), np.array([seq], np.uint64), np.zeros((1, width), np.float32)
    )
    writer.add_outputs(1, position, np.zeros((1, 4), np.float32))


def write_many(writer: RecordingWriter, seqs: range) -> None:
    for seq in seqs:
        add_batch(writer, seq)
        writer.commit()
        writer.copy_wal()


def test_a_second_writer_is_refused_without_the_lock_file_and_under_another_name(
    path: Path, writer: RecordingWriter
) -> None:
    lock_path(path).unlink()
    with pytest.raises(RecordingError, match=r"a\.rec"):
        RecordingWriter.resume(path, HEADER)
    other = path.with_name("b.rec")
    os.link(path, other)
    with pytest.raises(RecordingError, match=r"b\.rec"):
        RecordingWriter.resume(other, HEADER)
    add_batch(writer, 0)
    writer.commit()


def test_a_commit_of_another_program_ends_the_recording(path: Path, writer: RecordingWriter) -> None:
    with closing(sqlite3.connect(path)) as outsider:
        outsider.execute("DELETE FROM openings")
        outsider.commit()
    with pytest.raises(RecordingError, match=r"a\.rec"):
        add_batch(writer, 0)


@pytest.mark.parametrize("what", ["moved", "removed", "replaced", "without its WAL"])
def test_a_recording_that_is_moved_or_removed_ends_at_the_next_commit_and_nothing_more_is_durable(
    path: Path, tmp_path: Path, what: str
) -> None:
    durable, failed = list[int](), list[Exception]()
    recorder = Recorder(RecordingWriter.create(path, HEADER), 8, lambda: None, failed.append, durable.append)
    first = open_stream(recorder, 1, "a", 7, 0, 1, None)
    while first not in durable:
        threading.Event().wait(0.001)
    if what == "without its WAL":
        Path(f"{path}-wal").unlink()
    elif what == "removed":
        path.unlink()
    else:
        path.rename(tmp_path / "elsewhere.rec")
    if what == "replaced":
        path.write_bytes((tmp_path / "elsewhere.rec").read_bytes())
    open_stream(recorder, 2, "b", 8, 0, 1, None)
    recorder.stop()
    assert durable == [first]
    (error,) = failed
    assert "was moved or removed while it was being written" in str(error)


def test_a_lock_that_another_program_lets_go_of_is_waited_for(path: Path, writer: RecordingWriter) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as outsider:
        outsider.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, outsider.execute, ("ROLLBACK",))
        release.start()
        add_batch(writer, 0)
        writer.commit()
        release.join()
    with RecordingReader(path) as reader:
        assert reader.last_position == 3


def test_a_lock_that_another_program_keeps_is_said(path: Path) -> None:
    writer = RecordingWriter.create(path, HEADER, limits=DatabaseLimits(lock_wait_s=0.01))
    with closing(sqlite3.connect(path, isolation_level=None)) as outsider:
        outsider.execute("BEGIN IMMEDIATE")
        with pytest.raises(RecordingError, match=r"a\.rec"):
            add_batch(writer, 0)
    writer.abandon()


def test_a_lock_is_not_damage_and_reading_again_helps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordingWriter.create(path, HEADER).close()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.05))
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        with RecordingReader(path) as reader:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
            for read in (lambda: list(reader.rows("openings")), lambda: RecordingReader(path)):
                with pytest.raises(UnavailableRecording):
                    read()
            database.execute("ROLLBACK")
    with RecordingReader(path) as reader:
        assert reader.finished


def test_a_read_that_lasts_lets_the_wal_grow_to_a_bound_and_no_further(path: Path, writer: RecordingWriter) -> None:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as outsider:
        outsider.execute("BEGIN")
        outsider.execute("SELECT count(*) FROM header").fetchone()
        with pytest.raises(RecordingError, match=r"a\.rec"):
            write_many(writer, range(1000))
        assert Path(f"{path}-wal").stat().st_size < 3_000_000


def test_reading_a_recording_keeps_no_transaction_open(path: Path, writer: RecordingWriter) -> None:
    for seq in range(200):
        add_batch(writer, seq)
    writer.commit()
    with RecordingReader(path) as reader:
        batches = batches_of(reader)
        next(batches)
        write_many(writer, range(200, 1000))
        assert 1 + sum(1 for _ in batches) == 200


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE more (a)",
        "CREATE INDEX more ON openings (name)",
        "DROP TABLE states",
        "ALTER TABLE batches ADD COLUMN more",
    ],
)
def test_other_tables_than_those_of_a_recording_are_refused(path: Path, statement: str) -> None:
    RecordingWriter.create(path, HEADER).close()
    with closing(sqlite3.connect(path)) as outsider:
        outsider.execute(statement)
    with pytest.raises(DamagedRecording):
        RecordingReader(path)
