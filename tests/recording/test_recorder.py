from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.recorder import LATE_S, SMALL_ROWS_PER_BATCH, Recorder
from instep.recording.records import StateRows
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.rows import open_stream, stream_event

HEADER = make_header(gru_description(make_gru(3, 4)))


class HeldWriter(RecordingWriter):
    """A writer whose commits wait for the test, count, and may fail."""

    gate: threading.Event
    failure: Exception | None = None
    commits = committed = 0
    abandoned = False

    def commit(self) -> None:
        assert self.gate.wait(60)
        if self.failure is not None:
            raise self.failure
        self.commits += self.position > self.committed
        self.committed = self.position
        super().commit()

    def abandon(self) -> None:
        self.abandoned = True
        super().abandon()


class Calls:
    def __init__(self) -> None:
        self.room = threading.Semaphore(0)
        self.failures: list[Exception] = []
        self.failed = threading.Event()
        self.durable: list[int] = []

    def on_room(self) -> None:
        self.room.release()

    def on_durable(self, ticket: int) -> None:
        self.durable.append(ticket)

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)
        self.failed.set()

    def wait_for(self, ticket: int | None) -> None:
        deadline = time.monotonic() + 60
        while ticket not in self.durable:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def start(path: Path, queue_batches: int = 2, late_s: float = LATE_S) -> tuple[HeldWriter, Recorder, Calls]:
    writer = HeldWriter.create(path, HEADER)
    assert isinstance(writer, HeldWriter)
    writer.gate = threading.Event()
    calls = Calls()
    recorder = Recorder(writer, queue_batches, calls.on_room, calls.on_failure, calls.on_durable, late_s=late_s)
    return writer, recorder, calls


def add(recorder: Recorder, seq: int) -> int:
    x, y = np.full((1, 3), seq, np.float32), np.zeros((1, 4), np.float32)
    streams, seqs = np.array([1], np.uint32), np.array([seq], np.uint64)
    ticket = recorder.put(lambda writer: writer.add_inputs(seq, streams, seqs, x), batches=1)
    return recorder.put(lambda writer: writer.add_outputs(seq, ticket, y))


def test_all_that_waits_becomes_one_commit(tmp_path: Path) -> None:
    writer, recorder, _ = start(tmp_path / "a.rec", queue_batches=1000)
    open_stream(recorder, 1, "a", 7, 0, 1, None)
    for seq in range(200):
        add(recorder, seq)
    writer.gate.set()
    recorder.stop()
    # The first commit took what was there when the thread woke, the second the rest, the third the end.
    assert writer.commits <= 3


def note(recorder: Recorder) -> int:
    return recorder.put(lambda writer: writer.event(1, "note", None, ""), is_awaited=False)


def test_rows_that_nothing_waits_for_are_committed_with_those_that_follow(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec", late_s=600)
    writer.gate.set()
    calls.wait_for(open_stream(recorder, 1, "a", 7, 0, 1, None))
    notes = [note(recorder) for _ in range(10)]
    assert calls.durable == [1]
    calls.wait_for(stream_event(recorder, 2, "note", 1, 0))
    assert calls.durable == [1, notes[-1] + 1]
    hurried = note(recorder)
    recorder.hurry()
    calls.wait_for(hurried)
    note(recorder)
    recorder.stop()
    assert calls.durable == [1, notes[-1] + 1, hurried, hurried + 1]


def test_rows_that_nothing_waits_for_are_committed_soon_where_nothing_follows(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec")
    writer.gate.set()
    calls.wait_for(note(recorder))
    time.sleep(5 * LATE_S)  # the thread sleeps for as long as nothing happens
    calls.wait_for(note(recorder))
    recorder.stop()


def test_a_queue_that_is_half_full_waits_no_longer(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec", queue_batches=4, late_s=600)
    writer.gate.set()
    calls.wait_for(open_stream(recorder, 1, "a", 7, 0, 1, None))
    for _ in range(2):
        ticket = recorder.put(lambda writer: writer.event(1, "note", None, ""), batches=1, is_awaited=False)
    calls.wait_for(ticket)
    recorder.stop()


def test_room_is_what_is_not_yet_committed(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec", queue_batches=2)
    open_stream(recorder, 1, "a", 7, 0, 1, None)
    assert recorder.room > 0
    add(recorder, 0)
    assert recorder.room > 0
    add(recorder, 1)
    assert recorder.room <= 0
    assert not calls.room.acquire(timeout=0.05)
    writer.gate.set()
    assert calls.room.acquire(timeout=60)
    assert recorder.room > 0
    add(recorder, 2)
    recorder.stop()
    assert not calls.room.acquire(timeout=0), "on_room is called once for one time without room"


def test_small_rows_are_bounded_too(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec", queue_batches=1)
    for number in range(SMALL_ROWS_PER_BATCH):
        assert recorder.room > 0
        stream_event(recorder, number, "note", 1, 0)
    assert recorder.room <= 0
    writer.gate.set()
    assert calls.room.acquire(timeout=60)
    recorder.stop()


@pytest.mark.parametrize("failure", [sqlite3.OperationalError("database or disk is full"), OSError("broken")])
def test_a_failing_disk_ends_the_recording_aloud(tmp_path: Path, failure: Exception) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec")
    writer.failure = failure
    open_stream(recorder, 1, "a", 7, 0, 1, None)
    writer.gate.set()
    assert calls.failed.wait(60)
    assert recorder.failed is failure
    with pytest.raises(RecordingError, match=str(failure)):
        add(recorder, 0)
    recorder.stop()
    assert calls.failures == [failure]
    assert writer.abandoned
    with RecordingReader(tmp_path / "a.rec") as reader:
        assert reader.last_position == 0


def test_tickets_are_positions_and_become_durable_in_order(tmp_path: Path) -> None:
    writer, recorder, calls = start(tmp_path / "a.rec", queue_batches=100)
    opened = open_stream(recorder, 1, "a", 7, 0, 1, None)
    columns = np.array([1], np.uint32), np.array([0], np.uint64), np.zeros((1, 3), np.float32)
    inputs = recorder.put(lambda writer: writer.add_inputs(1, *columns), batches=1)
    failed = recorder.put(lambda writer: writer.fail_batch(1, inputs, "step_failed"))
    outputs = add(recorder, 0)
    nothing = np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32)
    rows = StateRows(np.array([1]), np.array([1]), np.ones((1, 1, 4), np.float32), np.array([1]), *nothing)
    checkpoint = recorder.put(lambda writer: writer.checkpoint(1, outputs, rows))
    assert [opened, inputs, failed, outputs, checkpoint] == [1, 2, 3, 5, 6]
    assert calls.durable == []
    writer.gate.set()
    recorder.stop()
    assert calls.durable[-1] == 6
    assert calls.durable == sorted(calls.durable)
    with RecordingReader(tmp_path / "a.rec") as reader:
        assert [batch.position for batch in batches_of(reader)] == [4]
        found = reader.checkpoint()
        assert (found.position, found.completed, found.openings, found.closings, found.events) == (5, 6, 1, 0, 1)
        (state,) = reader.states()
        assert (state.stream, state.position, state.seq) == (1, outputs, 1)
