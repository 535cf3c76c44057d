from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import select_streams
from instep.recording.table import FrameTable, TableChunk
from tests.support.forger import Forger
from tests.support.written import NAMES, Row, exact, write_recording


def table_of(
    reader: RecordingReader,
    wanted: Sequence[str] = (),
    on_progress: Callable[[float], None] = lambda share: None,
    chunk_bytes: int = 2**20,
    chunk_frames: int = 2**20,
) -> FrameTable:
    streams = reader.streams()
    return FrameTable(
        reader,
        streams,
        select_streams(streams, wanted),
        on_progress,
        chunk_bytes=chunk_bytes,
        chunk_frames=chunk_frames,
    )


def rows_of(frames: FrameTable, chunk: TableChunk) -> list[Row]:
    labels = (chunk.stream_ids, chunk.seqs, chunk.times_ns, chunk.x, chunk.y)
    names = [frames.names[at] for at in chunk.names]
    return [Row(*values) for values in zip(names, *(column.tolist() for column in labels), strict=True)]


def all_rows(path: Path, *wanted: str) -> tuple[FrameTable, list[Row]]:
    with RecordingReader(path) as reader:
        frames = table_of(reader, wanted)
        return frames, [row for chunk in frames.chunks() for row in rows_of(frames, chunk)]


def test_every_frame_once_and_in_order(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    frames, rows = all_rows(written.path)
    assert exact(rows) == exact(written.rows)
    assert (frames.frames, frames.unanswered) == (len(written.rows), 0)
    assert frames.names == list(NAMES)
    assert frames.stream_ids == [1, 2, 3, 4, 5]


def test_some_streams_by_name_and_by_number(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    frames, rows = all_rows(written.path, "3", NAMES[1])
    assert exact(rows) == exact(written.of(2, 3))
    assert frames.stream_ids == [2, 3]


def test_a_stream_that_is_still_open(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    assert exact(all_rows(written.path, "2")[1]) == exact(written.of(4))


@pytest.mark.parametrize(("chunk_bytes", "chunk_frames"), [(4 * 5 * 10, 2**20), (2**20, 10)])
def test_chunks_are_bounded(tmp_path: Path, chunk_bytes: int, chunk_frames: int) -> None:
    written = write_recording(tmp_path)
    with RecordingReader(written.path) as reader:
        frames = table_of(reader, chunk_bytes=chunk_bytes, chunk_frames=chunk_frames)
        chunks = list(frames.chunks())
    sizes = [len(chunk) for chunk in chunks]
    assert sum(sizes) == len(written.rows)
    assert min(sizes[:-1]) >= 10
    assert max(sizes) < 10 + 4  # a batch has at most four frames here
    assert exact([row for chunk in chunks for row in rows_of(frames, chunk)]) == exact(written.rows)


def test_a_frame_wider_than_a_chunk(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    with RecordingReader(written.path) as reader:
        frames = table_of(reader, chunk_bytes=1)
        chunks = [rows_of(frames, chunk) for chunk in frames.chunks()]
    assert max(map(len, chunks)) <= 4, "each is a batch"
    assert exact([row for chunk in chunks for row in chunk]) == exact(written.rows)


def test_frames_whose_outputs_were_not_recorded_are_counted_and_have_nan(tmp_path: Path) -> None:
    written = write_recording(tmp_path, unanswered=3)
    assert written.unanswered > 3
    frames, rows = all_rows(written.path)
    assert exact(rows) == exact(written.rows)
    assert frames.unanswered == written.unanswered
    few = all_rows(written.path, NAMES[1])[0].unanswered
    assert 0 < few < written.unanswered


def test_a_recording_that_is_still_being_written(tmp_path: Path) -> None:
    written = write_recording(tmp_path, finish=False)
    assert exact(all_rows(written.path)[1]) == exact(written.rows)


def test_a_frame_of_a_stream_that_was_never_opened(tmp_path: Path) -> None:
    written = write_recording(tmp_path, stranger_at=20)
    for wanted in ([], ["mic-1"]):
        with pytest.raises(RecordingError, match="holds frames of a stream that was never opened"):
            all_rows(written.path, *wanted)


def test_frames_that_do_not_follow_each_other_are_damage(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    forger = Forger(written.path, tmp_path / "b.rec")
    batch, at = forger.find_frame(2, 3)
    seqs = forger.column(batch, "seqs")
    seqs[at] = 4
    forger.change_batch(batch, seqs=seqs)
    said = rf"the batch at position {batch['position']} holds frame 4 of stream 2 \(.*\) where frame 3 belongs"
    with pytest.raises(DamagedRecording, match=said):
        all_rows(forger.path)
    forger = Forger(written.path, tmp_path / "c.rec")
    batch = next(row for row in forger.rows("batches") if row["size"] > 1)
    streams, seqs = np.frombuffer(batch["streams"], "<u4").copy(), np.frombuffer(batch["seqs"], "<u8").copy()
    streams[1], seqs[1] = streams[0], seqs[0]
    forger.change_batch(batch, streams=streams, seqs=seqs)
    with pytest.raises(DamagedRecording, match="two frames of one stream"):
        all_rows(forger.path)


def test_a_stream_that_ends_before_its_close_counts_is_damage(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    forger = Forger(written.path, tmp_path / "b.rec")
    closing = forger.rows("closings")[0]
    forger.change("closings", closing["position"], frames=closing["frames"] + 1)
    with pytest.raises(DamagedRecording, match=r"stream 1 \('mic-1'\) was closed before frame"):
        all_rows(forger.path, "1")
    assert exact(all_rows(forger.path, "2")[1]) == exact(written.of(4))


def test_progress_grows_to_one(tmp_path: Path) -> None:
    written = write_recording(tmp_path)
    for wanted in ([], ["mic-1"]):
        shares: list[float] = []
        with RecordingReader(written.path) as reader:
            list(table_of(reader, wanted, shares.append).chunks())
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.25
        assert 0.8 < shares[-1] <= 1


def test_a_stream_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no stream 'mic-3'; did you mean 'mic-2' or 'mic-1'"):
        all_rows(write_recording(tmp_path).path, "mic-1", "mic-3")
