from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instep.core.rings import Rings
from instep.core.verdict import Admission

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64

STREAMS = 5
WINDOW = 4


def rings(window: int = WINDOW, max_pending: int = 100) -> tuple[StreamTable, Rings]:
    table = StreamTable(STREAMS, max_owners=1)
    return table, Rings(table, window, STREAMS, 1, 1, max_pending)


def ints(*values: int) -> I64:
    return np.array(values, np.int64)


def column(*values: float) -> F32:
    return np.array(values, np.float32).reshape(-1, 1, 1)


def judged(kept: Rings, slots: I64, first_seqs: I64, skipped: I64, lengths: I64, timesteps: int) -> Admission:
    """What admission would have said."""
    fresh, seqs = lengths - skipped, first_seqs + np.arange(timesteps)[:, None]
    is_whole = bool((fresh == timesteps).all())
    codes, rows = np.zeros(len(slots), np.int32), kept.rows(slots, seqs)
    return Admission(slots, rows, skipped, lengths, codes, first_seqs + lengths, fresh, is_whole)


def append(table: StreamTable, kept: Rings, slot: int, *values: float, block: int = 0) -> list[int]:
    """Admit frames behind those that a slot has."""
    first = table.next_seq[[slot]].copy()
    table.next_seq[slot] += len(values)
    verdict = judged(kept, ints(slot), first, ints(0), ints(len(values)), len(values))
    ready = kept.append(verdict, column(*values), block)
    return [int(each) for each in ready]


def done(kept: Rings, slots: I64) -> I64:
    kept.applied(slots)
    return kept.let_go(slots)


def test_frames_come_out_in_the_order_they_went_in() -> None:
    table, kept = rings()
    assert append(table, kept, 1, 10, 11) == [1]
    assert append(table, kept, 2, 20) == [2]
    assert append(table, kept, 1, 12) == []
    assert kept.x[kept.take(ints(1, 2))[0], 0].tolist() == [10, 20]
    assert done(kept, ints(1, 2)).tolist() == [1]
    assert kept.x[kept.take(ints(1))[0], 0].tolist() == [11]
    assert done(kept, ints(1)).tolist() == [1]
    assert kept.x[kept.take(ints(1))[0], 0].tolist() == [12]
    assert done(kept, ints(1)).tolist() == []


def test_a_stream_that_steps_is_not_ready_until_it_is_done() -> None:
    table, kept = rings()
    append(table, kept, 1, 10)
    kept.take(ints(1))
    assert append(table, kept, 1, 11) == []
    with pytest.raises(AssertionError, match="stepping"):
        kept.take(ints(1))
    assert done(kept, ints(1)).tolist() == [1]


def test_a_stream_that_is_held_twice_is_ready_when_it_was_let_go_twice() -> None:
    table, kept = rings()
    kept.hold(ints(1, 2))
    kept.hold(ints(1))
    assert append(table, kept, 1, 10) == []
    assert append(table, kept, 2, 20) == []
    assert kept.let_go(ints(1, 2)).tolist() == [2]
    with pytest.raises(AssertionError, match="held"):
        kept.take(ints(1))
    assert kept.let_go(ints(1)).tolist() == [1]


def test_a_slot_without_pending_frames_is_never_taken() -> None:
    _, kept = rings()
    with pytest.raises(AssertionError, match="nothing pending"):
        kept.take(ints(1))


def test_only_the_frames_between_skipped_and_length_are_written() -> None:
    table, kept = rings()
    append(table, kept, 1, 10, 11)
    for _ in range(2):
        kept.take(ints(1))
        done(kept, ints(1))
    table.next_seq[[1, 2]] = (3, 1)
    x = np.array([[[90], [20], [80]], [[91], [81], [82]], [[12], [83], [84]], [[92], [85], [86]]], np.float32)
    verdict = judged(kept, ints(1, 2, 3), ints(0, 0, 0), ints(2, 0, 0), ints(3, 1, 0), 4)
    ready = kept.append(verdict, x, block=0)
    assert ready.tolist() == [1, 2]
    assert kept.x[kept.rows(ints(1), ints(0, 1, 2)), 0].tolist() == [10, 11, 12]
    assert kept.x[kept.rows(ints(2), ints(0, 1)), 0].tolist() == [20, 0]
    assert not kept.x[kept.rows(ints(3), ints(0, 1, 2, 3))].any()
    assert kept.pending_count == 2


def test_the_room_is_for_all_streams_together_and_is_given_back() -> None:
    table, kept = rings(max_pending=5)
    append(table, kept, 1, 10, 11)
    append(table, kept, 2, 20, 21)
    assert kept.room == 1
    with pytest.raises(AssertionError, match="room"):
        append(table, kept, 3, 30, 31)
    kept.take(ints(1, 2))
    done(kept, ints(1, 2))
    assert (kept.room, kept.pending_count) == (3, 2)


def test_every_frame_of_a_window_has_a_place_of_its_own_and_no_stream_shares_it() -> None:
    _, kept = rings()
    rows = kept.rows(np.arange(1, STREAMS + 1), 7 + np.arange(WINDOW)[:, None])
    assert len(np.unique(rows)) == WINDOW * STREAMS
    assert rows.min() >= 0
    assert rows.max() < len(kept.x) == len(kept.y) == len(kept.block)
    assert np.intersect1d(rows, kept.rows(ints(0), np.arange(WINDOW))).size == 0


def test_a_failed_step_takes_out_everything_pending_of_its_streams_only() -> None:
    table, kept = rings()
    append(table, kept, 1, 10, 11, 12)
    append(table, kept, 2, 20, 21)
    append(table, kept, 3, 30)
    kept.take(ints(1))
    done(kept, ints(1))
    kept.take(ints(1, 3))
    rows, whose = kept.failed(ints(1, 3))
    assert kept.x[rows, 0].tolist() == [11, 12, 30]
    assert whose.tolist() == [1, 1, 3]
    assert table.next_seq[[1, 2, 3]].tolist() == [1, 2, 0]
    assert (table.next_seq - table.step_seq)[1:4].tolist() == [0, 2, 0]
    assert kept.pending_count == 2
    assert append(table, kept, 1, 99) == [1]


def test_outputs_are_found_by_seq_until_a_window_later() -> None:
    table, kept = rings()
    for seq in range(2 * WINDOW + 1):
        append(table, kept, 1, seq)
        kept.y[kept.take(ints(1))[0], 0] = 100 + seq
        done(kept, ints(1))
    assert kept.outputs(kept.rows(ints(1), WINDOW + 1 + np.arange(WINDOW)))[:, 0].tolist() == [105, 106, 107, 108]


def test_inputs_are_compared_by_their_bits_as_far_as_asked() -> None:
    table, kept = rings()
    append(table, kept, 1, 1, 0.0, 3)
    append(table, kept, 2, 1, 2, 3)
    append(table, kept, 3, 1, 2, 3)
    x = np.array([[1, 1, 1], [-0.0, 2, 9], [9, 3, 9]], np.float32)[:, :, None]
    slots, first = ints(1, 2, 3), ints(0, 0, 0)
    assert kept.holds_same(slots, first, ints(3, 3, 3), x).tolist() == [1, 3, 1]
    assert kept.holds_same(slots, first, ints(1, 2, 0), x).tolist() == [1, 2, 0]


@dataclass
class Stream:
    """What a ring must do, with dictionaries by seq."""

    pending: list[int] = field(default_factory=list)
    inputs: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, float] = field(default_factory=dict)
    next_seq: int = 0

    def admit(self, value: float, window: int) -> None:
        """The next frame; it takes the place of the one a window before."""
        self.inputs[self.next_seq] = value
        self.inputs.pop(self.next_seq - window, None)
        self.outputs.pop(self.next_seq - window, None)
        self.pending.append(self.next_seq)
        self.next_seq += 1

    def fail(self) -> None:
        """Nothing that is pending will be computed."""
        self.next_seq = self.pending[0]
        self.pending.clear()


SLOTS = st.lists(st.integers(1, STREAMS), min_size=1, max_size=STREAMS, unique=True)
BLOCK = st.lists(
    st.tuples(st.integers(1, STREAMS), st.integers(0, 3)), min_size=1, max_size=STREAMS, unique_by=lambda each: each[0]
)


@given(st.integers(1, 6), st.lists(st.one_of(BLOCK, st.tuples(st.sampled_from(["step", "fail"]), SLOTS)), max_size=50))
def test_rings_behave_like_dictionaries_by_seq(
    window: int, events: list[list[tuple[int, int]] | tuple[str, list[int]]]
) -> None:
    table, kept = rings(window)
    truth = {slot: Stream() for slot in range(1, STREAMS + 1)}
    value = 0.0
    for event in events:
        if isinstance(event, list):
            block = [(slot, min(count, window - len(truth[slot].pending))) for slot, count in event]
            x = np.full((max(1, *(count for _, count in block)), len(block), 1), -1, np.float32)
            expected = [slot for slot, count in block if count and not truth[slot].pending]
            for index, (slot, count) in enumerate(block):
                for timestep in range(count):
                    value += 1
                    x[timestep, index] = value
                    truth[slot].admit(value, window)
            slots, lengths = (np.array(part, np.int64) for part in zip(*block, strict=True))
            first = table.next_seq[slots].copy()
            table.next_seq[slots] += lengths
            verdict = judged(kept, slots, first, np.zeros_like(slots), lengths, len(x))
            assert kept.append(verdict, x, block=0).tolist() == expected
        else:
            verb, chosen = event
            busy = [slot for slot in chosen if truth[slot].pending]
            if not busy:
                continue
            slots = np.array(busy, np.int64)
            (rows,) = kept.take(slots)
            assert kept.x[rows, 0].tolist() == [truth[slot].inputs[truth[slot].pending[0]] for slot in busy]
            if verb == "step":
                for row, slot in zip(rows.tolist(), busy, strict=True):
                    value += 1
                    kept.y[row] = truth[slot].outputs[truth[slot].pending.pop(0)] = value
                assert done(kept, slots).tolist() == [slot for slot in busy if truth[slot].pending]
            else:
                taken, whose = kept.failed(slots)
                assert whose.tolist() == [slot for slot in busy for _ in truth[slot].pending]
                lost = [truth[slot].inputs[seq] for slot in busy for seq in truth[slot].pending]
                assert kept.x[taken, 0].tolist() == lost
                for slot in busy:
                    truth[slot].fail()
    for slot, stream in truth.items():
        assert table.next_seq[slot] == stream.next_seq
        assert table.next_seq[slot] - table.step_seq[slot] == len(stream.pending)
        for seq, output in stream.outputs.items():
            assert kept.outputs(kept.rows(ints(slot), ints(seq))).item() == output
            assert kept.x[kept.rows(ints(slot), ints(seq)), 0].item() == stream.inputs[seq]
    assert kept.pending_count == sum(len(stream.pending) for stream in truth.values())


def test_a_run_takes_several_frames_of_each_stream() -> None:
    table, kept = rings()
    append(table, kept, 1, 10, 11, 12)
    append(table, kept, 2, 20, 21)
    rows = kept.take(ints(2, 1), 2)
    assert kept.x[rows, 0].tolist() == [[20, 10], [21, 11]]
    kept.applied(ints(2, 1), 2)
    assert kept.pending_count == 1
    assert table.step_seq[[1, 2]].tolist() == [2, 2]
    assert kept.let_go(ints(2, 1)).tolist() == [1]
    assert kept.take(ints(1), 2).shape == (1, 1)  # the last one


def test_a_run_that_fails_after_some_steps_takes_out_the_rest() -> None:
    table, kept = rings()
    append(table, kept, 1, 10, 11, 12)
    rows = kept.take(ints(1), 2)
    kept.applied(ints(1), 1)
    failed, whose = kept.failed(ints(1))
    assert failed.tolist() == [rows[1, 0], kept.rows(ints(1), ints(2))[0]]
    assert whose.tolist() == [1, 1]
    assert (kept.pending_count, int(table.next_seq[1])) == (0, 1)
