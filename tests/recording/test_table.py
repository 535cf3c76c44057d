"""A recording as one table, and as arrays by stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import instep.recording
from instep.recording import reader as recording_reader
from instep.recording.errors import DamagedRecording, NoSuchStream, RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedFrames, StreamInfo, select_streams
from instep.recording.table import OpenedRecording, RecordedStream, StreamIndex, known_outputs, read_frames
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import make_header
from tests.support.rows import open_stream
from tests.support.scribe import START_NS
from tests.support.written import DESCRIPTION, NAMES, Row, Written, bits, exact, write_recording


def chunks_of(
    path: Path,
    *wanted: str,
    on_progress: Callable[[float], None] = lambda share: None,
    part_frames: int = 10**6,
) -> tuple[list[StreamInfo], list[RecordedFrames]]:
    """The streams and the chunks, read batch by batch."""
    small = mock.patch.multiple(recording_reader, BYTES_AT_ONCE=1, ROWS_A_LOOK=1)
    with small, RecordingReader(path) as reader:
        streams = reader.streams()
        selected = select_streams(streams, wanted)
        chunks = list(read_frames(reader, streams, selected, on_progress, part_frames=part_frames))
        return [streams[at] for at in selected], chunks


def rows_of(streams: Sequence[StreamInfo], chunks: Sequence[RecordedFrames]) -> list[Row]:
    found = RecordedFrames.join(chunks)
    of = [streams[row] for row in StreamIndex(streams).rows(found.streams)]
    labels = ([info.name for info in of], [info.stream for info in of])
    columns = (found.seqs, found.times_ns, found.x, known_outputs(found))
    return [Row(*values) for values in zip(*labels, *(column.tolist() for column in columns), strict=True)]


def all_rows(path: Path, *wanted: str) -> list[Row]:
    return rows_of(*chunks_of(path, *wanted))


@pytest.mark.parametrize("finish", [True, False])
def test_every_frame_once_and_in_order(tmp_path: Path, finish: bool) -> None:
    written = write_recording(tmp_path, finish=finish)
    assert exact(all_rows(written.path)) == exact(written.rows)


def test_some_streams_by_name_and_by_number(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    assert exact(all_rows(written.path, "3", NAMES[1])) == exact(written.of(2, 3))
    assert exact(all_rows(written.path, "2")) == exact(written.of(4))
    with pytest.raises(NoSuchStream, match="mic-3"):
        all_rows(written.path, "mic-1", "mic-3")


def test_chunks_are_bounded_and_progress_grows_to_one(tmp_path: Path) -> None:
    written, shares = write_recording(tmp_path), list[float]()
    streams, chunks = chunks_of(written.path, part_frames=10, on_progress=shares.append)
    assert min(map(len, chunks[:-1])) >= 10
    assert max(map(len, chunks)) < 10 + 4, "a batch has at most four frames here"
    assert exact(rows_of(streams, chunks)) == exact(written.rows)
    assert shares == sorted(shares)
    assert (0 < shares[0] < 0.25, 0.8 < shares[-1] <= 1) == (True, True)


def test_frames_whose_outputs_were_not_recorded_are_marked_and_have_nan(tmp_path: Path) -> None:
    written = write_recording(tmp_path, unanswered=3)
    streams, chunks = chunks_of(written.path)
    assert exact(rows_of(streams, chunks)) == exact(written.rows)
    assert int((~RecordedFrames.join(chunks).answered).sum()) == written.unanswered > 3


def test_a_frame_of_a_stream_that_was_never_opened(tmp_path: Path) -> None:
    written = write_recording(tmp_path, stranger_at=20)
    for wanted in ([], ["mic-1"]):
        with pytest.raises(DamagedRecording):
            all_rows(written.path, *wanted)


def test_frames_that_do_not_follow_each_other_are_damage(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    forger = Forger(written.path, tmp_path / "b.rec")
    batch, at = forger.find_frame(2, 3)
    seqs = forger.column(batch, "seqs")
    seqs[at] = 4
    forger.change_batch(batch, seqs=seqs)
    for read in (all_rows, lambda path: OpenedRecording(path)[NAMES[1]]):
        with pytest.raises(DamagedRecording, match=rf"position {batch['position']}\b"):
            read(forger.path)


def test_a_stream_that_ends_before_its_close_counts_is_damage(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    forger = Forger(written.path, tmp_path / "b.rec")
    closing = forger.rows("closings")[0]
    forger.change("closings", closing["position"], frames=closing["frames"] + 1)
    with pytest.raises(DamagedRecording, match="stream 1 "):
        all_rows(forger.path, "1")
    assert exact(all_rows(forger.path, "2")) == exact(written.of(4))


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
    assert f"{found.name!r} stream_id={found.stream_id}: {len(rows)} frames, 3 inputs" in repr(found)


@pytest.mark.parametrize("unanswered", [0, 3])
def test_streams_by_name(tmp_path: Path, unanswered: int) -> None:
    written = write_recording(tmp_path, unanswered=unanswered)
    before = written.path.read_bytes()
    with instep.recording.open(str(written.path)) as recording:
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
            with pytest.raises(NoSuchStream, match="mic-3"):
                look("mic-3")
    assert written.path.read_bytes() == before
    for read in (recording.values, recording.items, lambda: recording["mic-1"], lambda: recording.openings("mic-1")):
        with pytest.raises(RecordingError):
            read()


def test_while_it_is_written_it_shows_what_was_committed_when_it_was_opened(tmp_path: Path) -> None:
    writer = RecordingWriter.create(tmp_path / "r.instep", make_header(DESCRIPTION))

    def step(seq: int) -> None:
        x = np.full((1, 3), seq, np.float32)
        batch = writer.add_inputs(START_NS, np.array([1], np.uint32), np.array([seq], np.uint64), x)
        writer.add_outputs(START_NS, batch, x[:, :2])
        writer.commit()

    open_stream(writer, 1, "mic", 1, 0, START_NS, None)
    step(0)
    with instep.recording.open(tmp_path / "r.instep") as first:
        step(1)
        with instep.recording.open(tmp_path / "r.instep") as second:
            step(2)
            assert [found["mic"].seqs.tolist() for found in (first, second)] == [[0], [0, 1]]
    writer.close()
