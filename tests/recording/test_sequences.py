from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from instep.recording.errors import RecordingError
from instep.recording.reader import READ_LIMITS, ReadLimits, RecordingReader
from instep.recording.sequences import SequenceIndex, all_frames
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record
from tests.support.scribe import Scribe

GRU = make_gru(3, 4)
HEADER = make_header(gru_description(GRU))
LENGTHS = [5, 0, 9, 40, 7]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "good.rec"
    record(path, HEADER, gru_step(GRU), LENGTHS, leave_open=[3])
    return path


def index_of(path: Path, limits: ReadLimits = READ_LIMITS) -> SequenceIndex:
    with RecordingReader(path, limits) as reader:
        return SequenceIndex(reader, lambda _: None)


def test_sequences_are_what_the_gru_saw_and_said(path: Path) -> None:
    shares: list[float] = []
    with RecordingReader(path) as reader:
        index = SequenceIndex(reader, shares.append, all_frames)
        assert index.frames.tolist() == LENGTHS
        assert index.frames_present == 61
        assert index.defects == {}
        held = index.sequences(np.array([3, 1, 0]))
    assert held.lengths.tolist() == [40, 0, 5]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] <= 1
    assert len(held.places(1)) == 0
    for places in (held.places(0), held.places(2)):
        with torch.inference_mode():
            y, _ = GRU(torch.from_numpy(held.x[places])[:, None])
        np.testing.assert_allclose(held.y[places], y[:, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("bytes_at_once", [1, 300, 2**20])
def test_frames_are_found_however_many_batches_are_read_together(tmp_path: Path, bytes_at_once: int) -> None:
    limits = ReadLimits(bytes_at_once, rows_a_look=1)
    writer = RecordingWriter.create(tmp_path / "a.rec", HEADER)
    scribe = Scribe(writer, gru_step(GRU))
    for stream in (7, 3, 5):
        scribe.open(stream, first_seq=stream)
    for turn in range(20):
        scribe.step([3, 7] if turn % 3 else [5, 7, 3])
        if turn == 11:
            scribe.reset(3)
            scribe.reset(7, scribe.random_state())
    for _ in range(2):
        scribe.step([7, 5], "unanswered")
    writer.commit()
    writer.close()
    index = index_of(tmp_path / "a.rec", limits)
    assert index.defects == {}
    # Of each stretch: its stream, first frame and number of frames, and how many of them have no outputs.
    expected = [(7, 7, 12, 0), (3, 3, 12, 0), (5, 5, 9, 2), (3, 15, 8, 0), (7, 19, 10, 2)]
    streams = [index.streams[stretch.row].stream for stretch in index.stretches]
    firsts = [stretch.first_seq for stretch in index.stretches]
    assert list(zip(streams, firsts, index.frames, index.unanswered, strict=True)) == expected
    with RecordingReader(tmp_path / "a.rec", limits) as reader:
        held = SequenceIndex(reader, lambda _: None, all_frames).sequences(np.arange(5))
    for at, (stream, first, count, unanswered) in enumerate(expected):
        x = np.stack([scribe.x[stream][seq] for seq in range(first, first + count)])
        y = np.stack([scribe.y[stream][seq] for seq in range(first, first + count)])
        of = held.places(at)
        assert held.x[of].tobytes() == x.tobytes()
        answered = held.answered[of]
        assert answered.tolist() == [True] * (count - unanswered) + [False] * unanswered
        assert held.y[of][answered].tobytes() == y[answered].tobytes()


def test_frames_of_the_chosen_streams_alone_are_kept(path: Path) -> None:
    with RecordingReader(path) as reader:
        everything = SequenceIndex(reader, lambda _: None, all_frames)
        some = SequenceIndex(reader, lambda _: None, lambda streams: [0, 3])
        none = SequenceIndex(reader, lambda _: None)
        whole, held = everything.sequences(np.array([0, 3])), some.sequences(some.kept)
    assert len(held.x) == len(held.y) == len(held.answered) == 45
    for at in range(2):
        assert held.x[held.places(at)].tobytes() == whole.x[whole.places(at)].tobytes()
    assert len(none.sequences(none.kept).x) == 0
    assert some.frames.tolist() == none.frames.tolist() == LENGTHS, "all are counted and checked"


def forge_column(path: Path, stream: int, seq: int, name: str, value: int) -> Path:
    forger = Forger(path, path.parent / "forged.rec")
    batch, at = forger.find_frame(stream, seq)
    column = forger.column(batch, name)
    column[at] = value
    forger.change_batch(batch, **{name: column})
    return forger.path


@pytest.mark.parametrize(
    ("seq", "value", "sentence", "frames"),
    [
        (4, 5, "frame 4 is missing: frame 5 was recorded in its place", 4),
        (4, 3, "frame 3 was recorded again where frame 4 belongs", 4),
        (0, 2**63, f"frame {-(2**63)} was recorded again where frame 0 belongs", 0),
    ],
)
def test_wrong_seqs_are_named(path: Path, seq: int, value: int, sentence: str, frames: int) -> None:
    index = index_of(forge_column(path, 3, seq, "seqs", value))
    assert index.defects == {2: sentence}
    assert index.frames.tolist() == [5, 0, frames, 40, 7]
    assert index.frames_present == 61


def test_only_the_frames_before_a_defect_are_loaded(path: Path) -> None:
    with RecordingReader(path) as good, RecordingReader(forge_column(path, 3, 6, "seqs", 2)) as bad:
        whole = SequenceIndex(good, lambda _: None, all_frames).sequences(np.arange(5))
        part = SequenceIndex(bad, lambda _: None, all_frames).sequences(np.arange(5))
    assert part.lengths.tolist() == [5, 0, 6, 40, 7]
    assert len(part.x) == len(whole.x) - 3
    for stretch, length in enumerate(part.lengths):
        places, expected = part.places(stretch), whole.places(stretch)[:length]
        assert part.x[places].tobytes() == whole.x[expected].tobytes()
        assert part.y[places].tobytes() == whole.y[expected].tobytes()


def test_frames_of_a_stream_that_never_opened_are_damage(path: Path) -> None:
    with pytest.raises(RecordingError, match=r"the row at position .* is of a stream that was never opened"):
        index_of(forge_column(path, 3, 4, "streams", 99))


def test_frames_without_any_stream_are_damage(path: Path) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    for table in ("closings", "openings"):
        for row in forger.rows(table):
            forger.remove(table, row["position"])
    with pytest.raises(RecordingError, match="never opened"):
        index_of(forger.path)


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_frames_of_a_stream_in_one_step_are_a_defect(path: Path, ahead: int) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    batch = next(row for row in forger.rows("batches") if row["size"] >= 2)
    numbers, seqs = forger.column(batch, "streams"), forger.column(batch, "seqs")
    numbers[1], seqs[1] = numbers[0], seqs[0] + ahead
    forger.change_batch(batch, streams=numbers, seqs=seqs)
    index = index_of(forger.path, ReadLimits(1, 1))  # the stream whose frame is gone is noticed by itself
    row = int(numbers[0]) - 1
    assert index.defects[row] == f"two frames were recorded in one step, at frame {seqs[0]}"
    assert index.frames[row] == seqs[0]


def test_frames_after_the_close_are_a_defect(path: Path) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    opening = forger.rows("openings")[0]["position"]
    closing = next(row for row in forger.rows("closings") if row["stream"] == 1)["position"]
    assert (opening, closing) != (1, 1)
    last, _ = forger.find_frame(1, 4)
    # The close changes places with the batch of the last frame.
    forger.move("closings", closing, last["position"])
    forger.move("batches", last["position"], closing)
    forger.move("outputs", last["outputs"], closing + 1_000_000)
    forger.change("outputs", closing + 1_000_000, batch=closing)
    index = index_of(forger.path)
    assert index.defects[0] == "frame 4 was recorded while the stream was not open"


@pytest.mark.parametrize("claimed", [4, 6])
def test_a_close_that_counts_other_frames_is_a_defect(path: Path, claimed: int) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], frames=claimed)
    index = index_of(forger.path)
    assert index.defects == {
        0: f"the stream was closed before frame {claimed}, but its recorded frames end before frame 5"
    }
    assert index.frames[0] == 5
