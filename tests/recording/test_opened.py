"""A recording as arrays by stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import instep.recording
from instep.recording.errors import DamagedRecording, NoSuchStream, RecordingError
from instep.recording.opened import OpenedRecording, RecordedStream
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import make_header
from tests.support.rows import open_stream
from tests.support.scribe import START_NS
from tests.support.written import DESCRIPTION, NAMES, Written, bits, write_recording


def check(found: RecordedStream, written: Written) -> None:
    rows = written.of(found.stream_id)
    assert found.name == NAMES[found.stream_id - 1]
    assert len(found) == len(rows)
    assert bits(found.inputs) == bits([row.x for row in rows])
    assert bits(found.outputs) == bits([row.y for row in rows])
    assert found.times_ns.tolist() == [row.time_ns for row in rows]
    assert found.seqs.tolist() == [row.seq for row in rows]
    assert (found.inputs.shape, found.outputs.shape) == ((len(rows), 3), (len(rows), 2))
    assert {array.dtype.str for array in (found.inputs, found.outputs)} == {"<f4"}
    size = f"{len(rows)} frames, 3 inputs and 2 outputs each"
    assert repr(found) == f"<RecordedStream {found.name!r} stream_id={found.stream_id}: {size}>"


def test_one_of_each_is_singular(tmp_path: Path) -> None:
    number = np.zeros((1, 1), np.float32)
    found = RecordedStream("mic", 7, number, number, np.zeros(1, np.int64), np.zeros(1, np.uint64))
    assert repr(found) == "<RecordedStream 'mic' stream_id=7: 1 frame, 1 input and 1 output each>"
    writer = RecordingWriter.create(tmp_path / "a.rec", make_header(DESCRIPTION))
    open_stream(writer, 1, "mic", 1, 0, START_NS, None)
    writer.close()
    with OpenedRecording(tmp_path / "a.rec") as recording:
        assert repr(recording) == "<OpenedRecording of model 'test': 1 name of a stream>"


@pytest.mark.parametrize("unanswered", [0, 3])
def test_streams_by_name(tmp_path: Path, unanswered: int) -> None:
    written = write_recording(tmp_path, unanswered=unanswered)
    before = written.path.read_bytes()
    with OpenedRecording(written.path, chunk_frames=16) as recording:
        assert list(recording) == ["mic-1", NAMES[1], "2", "mic-2"]
        assert (len(recording), recording.header.model_name) == (4, "test")
        assert repr(recording) == "<OpenedRecording of model 'test': 4 names of streams>"
        assert [recording[name].stream_id for name in recording] == [3, 2, 4, 5]
        assert [found.stream_id for found in recording.openings("mic-1")] == [1, 3]
        assert {name: found.name for name, found in recording.items()} == {name: name for name in recording}
        for found in (*recording.values(), *recording.openings("mic-1"), *map(recording.__getitem__, recording)):
            check(found, written)
        assert ("mic-2" in recording, "mic-3" in recording, recording.get("mic-3")) == (True, False, None)
        for look in (recording.__getitem__, recording.openings):
            with pytest.raises(NoSuchStream, match=r"^the recording has no stream 'mic-3'; did you mean 'mic-2'"):
                look("mic-3")
    assert written.path.read_bytes() == before
    assert (next(iter(recording)), recording.header.model_name) == ("mic-1", "test")
    for read in (recording.values, recording.items, lambda: recording["mic-1"], lambda: recording.openings("mic-1")):
        with pytest.raises(RecordingError, match=r"^the recording .* was closed: open it again") as refused:
            read()
        assert type(refused.value) is RecordingError
    with pytest.raises(NoSuchStream):
        recording["mic-3"]


def test_while_it_is_written_it_shows_what_was_committed_when_it_was_opened(tmp_path: Path) -> None:
    writer = RecordingWriter.create(tmp_path / "r.instep", make_header(DESCRIPTION))

    def step(seq: int) -> None:
        x = np.full((1, 3), seq, np.float32)
        batch = writer.add_inputs(START_NS, np.array([1], np.uint32), np.array([seq], np.uint64), x)
        writer.add_outputs(START_NS, batch, x[:, :2])
        writer.commit()

    open_stream(writer, 1, "mic", 1, 0, START_NS, None)
    step(0)
    first = instep.recording.open(str(tmp_path / "r.instep"))
    step(1)
    second = instep.recording.open(tmp_path / "r.instep")
    step(2)
    assert [found["mic"].seqs.tolist() for found in (first, second)] == [[0], [0, 1]]
    first.close()
    second.close()
    writer.close()


def test_what_is_no_recording_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot read the recording"):
        instep.recording.open(tmp_path / "absent")
    forger = Forger(write_recording(tmp_path).path, tmp_path / "b.rec")
    batch, at = forger.find_frame(2, 3)
    seqs = forger.column(batch, "seqs")
    seqs[at] = 4
    forger.change_batch(batch, seqs=seqs)
    with (
        instep.recording.open(forger.path) as recording,
        pytest.raises(DamagedRecording, match="where frame 3 belongs"),
    ):
        recording[NAMES[1]]
