from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.schema import APPLICATION_ID, row_crc
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.rows import close_stream, open_stream, stream_event
from tests.support.scribe import START_NS
from tests.support.states import rows_of

HEADER = make_header(gru_description(make_gru(3, 4)))


def small_batch(writer: RecordingWriter, seq: int = 0, streams: tuple[int, ...] = (1, 2)) -> None:
    size = len(streams)
    x = np.arange(size * 3, dtype=np.float32).reshape(size, 3)
    y = (np.arange(size * 4) / 8).reshape(size, 4).astype(np.float32)
    batch = writer.add_inputs(START_NS, np.array(streams, np.uint32), np.full(size, seq, np.uint64), x)
    writer.add_outputs(START_NS, batch, y)


def test_plain_sql_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    writer = RecordingWriter.create(path, HEADER)
    open_stream(writer, 1, "mic-1", 100, 0, 11, None)
    open_stream(writer, 2, "mic-2", 101, 7, 12, np.full((1, 4), 0.5, np.float32))
    small_batch(writer)
    stream_event(writer, 14, "note", 2, 0, "seen")
    close_stream(writer, 1, 15, "closed", 1, np.ones((1, 4), np.float32))
    writer.close()

    database = sqlite3.connect(path)
    assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert database.execute("PRAGMA user_version").fetchone() == (2,)
    assert database.execute("PRAGMA page_size").fetchone() == (16384,)
    openings = database.execute("SELECT position, stream, name, epoch, first_seq, initial_state FROM openings")
    assert openings.fetchall() == [
        (1, 1, "mic-1", 100, 0, None),
        (2, 2, "mic-2", 101, 7, np.full(4, 0.5, "<f4").tobytes()),
    ]
    (batch,) = database.execute("SELECT * FROM batches").fetchall()
    assert batch[:3] == (3, START_NS, 2)
    assert batch[3:6] == (
        np.array([1, 2], "<u4").tobytes(),
        np.array([0, 0], "<u8").tobytes(),
        np.arange(6, dtype="<f4").tobytes(),
    )
    assert batch[6] == row_crc(*batch[:6])
    (outputs,) = database.execute("SELECT * FROM outputs").fetchall()
    assert outputs[:4] == (4, START_NS, 3, (np.arange(8, dtype="<f4") / 8).tobytes())
    assert outputs[4] == row_crc(*outputs[:4])
    events = database.execute("SELECT position, stream, seq, kind, detail, state FROM events").fetchall()
    assert events[0] == (5, 2, 0, "note", "seen", None)
    assert events[1][:4] == (7, None, None, "end")
    assert database.execute("SELECT position, stream, frames, reason FROM closings").fetchall() == [(6, 1, 1, "closed")]
    assert database.execute("SELECT * FROM newest").fetchall() == [(7, 0, row_crc(7, 0))]
    database.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.rec"]


def test_rows_written_together_are_those_written_one_by_one(tmp_path: Path) -> None:
    states = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    numbers, seqs, lost = np.array([1, 2, 3]), np.array([7, 0, 9]), np.array([False, True, False])
    together = RecordingWriter.create(tmp_path / "together.rec", HEADER)
    together.open_streams(5, numbers, ["a", "b", "c"], np.array([2**62, 2, 3], np.uint64), seqs, rows_of(states))
    together.stream_events(6, "reset", numbers, seqs, ["", "x", ""], rows_of(states))
    together.stream_events(7, "parked", numbers[:0], seqs[:0], [])
    together.stream_events(8, "parked", numbers, seqs, iter(["", "", ""]))
    together.close_streams(9, numbers, "closed", seqs, rows_of(states), lost)
    assert together.position == 12
    together.close()
    single = RecordingWriter.create(tmp_path / "single.rec", HEADER)
    for at, (name, epoch) in enumerate([("a", 2**62), ("b", 2), ("c", 3)]):
        open_stream(single, at + 1, name, epoch, int(seqs[at]), 5, states[at])
    for at, detail in enumerate(["", "x", ""]):
        stream_event(single, 6, "reset", at + 1, int(seqs[at]), detail, states[at])
    for at in range(3):
        stream_event(single, 8, "parked", at + 1, int(seqs[at]))
    for at in range(3):
        close_stream(single, at + 1, 9, "closed", int(seqs[at]), None if lost[at] else states[at])
    single.close()
    for table in ("openings", "closings", "events", "newest"):
        found = [
            sqlite3.connect(tmp_path / file).execute(f"SELECT * FROM {table} WHERE position < 13").fetchall()
            for file in ("together.rec", "single.rec")
        ]
        assert found[0] == found[1], table
    with RecordingReader(tmp_path / "together.rec") as reader:
        reader.check_positions()
        assert [info.final_state is None for info in reader.streams()] == lost.tolist()


def test_a_file_with_content_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(b"precious")
    with pytest.raises(RecordingError):
        RecordingWriter.create(path, HEADER)
    assert path.read_bytes() == b"precious"


def test_what_is_not_committed_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    writer = RecordingWriter.create(path, HEADER)
    open_stream(writer, 1, "a", 9, 0, 1, None)
    writer.commit()
    small_batch(writer, streams=(1,))
    with RecordingReader(path) as reader:
        assert reader.last_position == 1
        assert not reader.finished
    writer.abandon()
    with RecordingReader(path) as reader:
        assert reader.last_position == 1
        assert list(batches_of(reader)) == []


def test_closing_while_somebody_reads_leaves_a_whole_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    writer = RecordingWriter.create(path, HEADER)
    for stream in range(1, 4):
        open_stream(writer, stream, "a", 9, 0, 1, None)
    writer.commit()
    with RecordingReader(path) as early:
        rows = early.rows("openings")
        next(rows)  # a statement under way keeps the file in WAL mode
        writer.close()
        assert len(list(rows)) == 2
    with RecordingReader(path) as reader:
        assert reader.finished
        assert len(reader.streams()) == 3
