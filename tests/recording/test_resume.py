from __future__ import annotations

import os
import re
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.recording.database import LIMITS
from instep.recording.errors import RecordingError
from instep.recording.lock import is_being_written, lock_path
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.rows import open_stream, stream_event
from tests.support.scribe import Scribe
from tests.support.warm import WarmProcess

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))


def header(**changes: Any) -> Any:
    return make_header(gru_description(GRU), **changes)


def begun(path: Path, *, close: bool) -> Scribe:
    scribe = Scribe(RecordingWriter.create(path, HEADER), gru_step(GRU))
    scribe.open(1)
    scribe.step([1])
    scribe.writer.commit()
    if close:
        scribe.writer.close()
    else:
        scribe.writer.event(1, "never committed", None, "")
        scribe.writer.abandon()
    return scribe


@pytest.mark.parametrize("close", [True, False])
def test_it_goes_on_after_the_last_committed_row(tmp_path: Path, close: bool) -> None:
    path = tmp_path / "a.rec"
    scribe = begun(path, close=close)
    last = 4 if close else 3
    scribe.writer = RecordingWriter.resume(path, HEADER)
    assert scribe.writer.position == last + 1
    scribe.step([1])
    scribe.writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.rec"]
    with RecordingReader(path) as reader:
        reader.check_positions()
        assert reader.finished
        assert [batch.seqs.tolist() for batch in batches_of(reader)] == [[0], [1]]
        events = [(event.position, event.kind, event.seq) for event in reader.events()]
        assert events[-2] == (last + 1, "recovered", last)
        assert events[-1][1] == "end"
        assert [engine.position for engine in reader.engines] == [0]


def test_who_reads_a_closed_recording_for_long_is_said_and_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.rec"
    begun(path, close=True)
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchall()
    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0))
        with pytest.raises(RecordingError, match=r"a\.rec"):
            RecordingWriter.resume(path, HEADER)
    assert reader.execute("SELECT count(*) FROM batches").fetchone() == (1,)
    reader.close()
    RecordingWriter.resume(path, HEADER).close()


def test_another_model_is_refused_and_the_lock_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    begun(path, close=True)
    before = path.read_bytes()
    with pytest.raises(RecordingError):
        RecordingWriter.resume(path, header(model_fingerprint="cd" * 32))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.rec"]


def test_another_engine_is_noted_and_the_first_one_stays_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    scribe = begun(path, close=True)
    other = header(arithmetic="torch 1.9 on cuda:0", durability="fsync")
    scribe.writer = RecordingWriter.resume(path, other)
    scribe.step([1])
    scribe.writer.close()
    with RecordingReader(path) as reader:
        assert reader.header == HEADER
        assert [engine.position for engine in reader.engines] == [0, 6]
        assert reader.engines[1].header == other
    RecordingWriter.resume(path, other).close()
    with RecordingReader(path) as reader:
        assert len(reader.engines) == 2


def test_there_is_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    assert not is_being_written(path)
    writer = RecordingWriter.create(path, HEADER)
    assert is_being_written(path)
    for again in (RecordingWriter.create, RecordingWriter.resume):
        with pytest.raises(RecordingError, match=rf"a\.rec .*{os.getpid()}"):
            again(path, HEADER)
    writer.abandon()
    assert not is_being_written(path)
    RecordingWriter.resume(path, HEADER).close()
    assert not lock_path(path).exists()


PROGRAM = """
import sys, threading
from pathlib import Path
import numpy as np
from instep.recording.recorder import Recorder
from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
header = RecordingHeader.from_rows({rows!r})
writer = RecordingWriter.create(Path(sys.argv[1]), header)

def durable(ticket):
    sys.stdout.write(f"{{ticket}}\\n")
    sys.stdout.flush()

room = threading.Semaphore(0)
recorder = Recorder(writer, 8, room.release, lambda error: None, durable)
one = np.array([1])
recorder.put(lambda writer: writer.open_streams(1, one, ["a"], one.astype(np.uint64), one - 1, None), small_rows=1)
seq = 0
while True:
    while recorder.room <= 0:
        room.acquire(timeout=1)
    columns = np.array([1], np.uint32), np.array([seq], np.uint64), np.full((1, 3), seq, np.float32)
    ticket = recorder.put(lambda writer, columns=columns: writer.add_inputs(1, *columns), batches=1)
    y = np.full((1, 4), seq, np.float32)
    recorder.put(lambda writer, ticket=ticket, y=y: writer.add_outputs(1, ticket, y))
    seq += 1
"""


@pytest.mark.parametrize(("durability", "lines"), [("commit", 1), ("commit", 40), ("commit", 300), ("fsync", 25)])
def test_what_was_called_durable_survives_kill_9(tmp_path: Path, durability: str, lines: int) -> None:
    path = tmp_path / "a.rec"
    program = PROGRAM.format(rows=header(durability=durability).rows())
    durable = 0
    (tmp_path / "program.py").write_text(program)
    writing = WarmProcess([str(path)], program=str(tmp_path / "program.py"))
    try:
        assert writing.stdout is not None
        for _ in range(lines):
            durable = int(writing.stdout.readline())
        assert is_being_written(path)
        with pytest.raises(RecordingError, match=str(writing.pid)):
            RecordingWriter.resume(path, HEADER)
    finally:
        writing.kill()
    said = [int(line) for line in writing.communicate()[0].splitlines() if re.fullmatch(r"\d+", line)]
    durable = max([durable, *said[:-1]])  # the last line may be torn
    with Recovered(path) as recovered:
        assert recovered.last_position >= durable > 0
        frames = next(recovered.segments()).frames
    seqs = np.arange(len(frames))
    assert frames.seqs.tolist() == seqs.tolist()
    assert (frames.x == seqs[:, None]).all()
    assert frames.answered[:-1].all()
    assert (frames.y == seqs[:, None])[frames.answered].all()
    RecordingWriter.resume(path, header(durability=durability)).close()


def test_the_wal_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    writer = RecordingWriter.create(path, HEADER)
    open_stream(writer, 1, "a", 1, 0, 1, None)
    for seq in range(10):
        stream_event(writer, 1, "state", 1, seq, "", np.zeros(LIMITS.wal_bytes // 12, np.float32))
        writer.commit()
        writer.copy_wal()
    size = Path(f"{path}-wal").stat().st_size
    assert size < 2 * LIMITS.wal_bytes
    assert path.stat().st_size > LIMITS.wal_bytes
    writer.close()


def test_after_a_failure_the_wal_is_left_alone(tmp_path: Path) -> None:
    # Closing the last connection would copy the WAL into the file: writing, after writing has failed.
    path = tmp_path / "a.rec"
    begun(path, close=False)
    before = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    writer = RecordingWriter.resume(path, HEADER)
    writer.event(1, "not committed", None, "")
    writer.abandon()
    assert (path.read_bytes(), Path(f"{path}-wal").read_bytes()) == before
