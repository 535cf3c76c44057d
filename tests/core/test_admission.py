from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.core.admission import RepeatedStream, finite_lengths, resolve_distinct
from instep.core.typing import F32
from instep_client.protocol.codes import Code
from tests.support.core_streams import FEATURES, OWNER, CoreStreams, frames, u64

W = 4


@pytest.fixture
def core() -> CoreStreams:
    return CoreStreams(W)


def ones(timesteps: int, columns: int) -> F32:
    return np.ones((timesteps, columns, FEATURES), np.float32)


def test_a_good_block_is_admitted_whole_and_moves_the_expected_seq(core: CoreStreams) -> None:
    slots, handles = core.open("a", "b")
    verdict = core.admit(handles, u64(0, 0), ones(3, 2))
    assert verdict.lengths.tolist() == [3, 3]
    assert verdict.skipped.tolist() == [0, 0]
    assert verdict.codes.tolist() == [0, 0]
    assert core.table.next_seq[slots].tolist() == [3, 3]


@pytest.mark.parametrize("seq", [4, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seq_beyond_the_expected_one_is_a_gap(core: CoreStreams, seq: int) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([0, 1, 2]))
    verdict = core.admit(handles, u64(seq), frames([9]))
    assert (verdict.codes.tolist(), verdict.lengths.tolist(), verdict.expected_seq.tolist()) == (
        [Code.SEQ_GAP],
        [0],
        [3],
    )
    assert core.table.next_seq[slots].tolist() == [3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_frame_stops_its_own_column_only(core: CoreStreams, bad: float) -> None:
    slots, handles = core.open("a", "b", "c")
    x = ones(4, 3)
    x[2, 1, 1] = bad
    verdict = core.admit(handles, u64(0, 0, 0), x)
    assert verdict.lengths.tolist() == [4, 2, 4]
    assert verdict.codes.tolist() == [0, Code.NOT_FINITE, 0]
    assert verdict.expected_seq.tolist() == [4, 2, 4]
    assert core.table.next_seq[slots].tolist() == [4, 2, 4]


def test_a_foreign_streams_seq_is_neither_moved_nor_told(core: CoreStreams) -> None:
    theirs, handles = core.open("theirs", owner=2, first_seqs=[7])
    verdict = core.admit(handles, u64(7), ones(1, 1), acked=u64(7))
    assert verdict.codes.tolist() == [Code.FOREIGN_STREAM]
    assert verdict.expected_seq.tolist() == [0]
    assert core.table.next_seq[theirs].tolist() == [7]


def test_a_fenced_handle_neither_steps_nor_acknowledges_nor_is_told_the_seq(core: CoreStreams) -> None:
    slots, former = core.open("a", first_seqs=[7])
    core.table.hand_over(slots, OWNER, now_ns=0)
    present = core.table.slots.handles(slots)
    verdict = core.admit(np.concatenate([former, present]), u64(7, 7), ones(1, 2), acked=u64(7, 0))
    assert verdict.codes.tolist() == [Code.FENCED, Code.WINDOW_FULL]
    assert verdict.expected_seq.tolist() == [0, 7]
    assert core.table.next_seq[slots].tolist() == [7]


def test_unknown_columns_beside_good_ones(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    mixed = np.concatenate([u64(0, 99, 2**64 - 1), handles])
    verdict = core.admit(mixed, u64(0, 0, 0, 0), ones(1, 4))
    assert verdict.codes.tolist() == [Code.UNKNOWN_STREAM] * 3 + [0]
    assert core.table.next_seq[slots].tolist() == [1]
    assert core.table.next_seq[0] == 0


def test_seq_is_judged_before_values(core: CoreStreams) -> None:
    _, handles = core.open("a")
    assert core.admit(handles, u64(3), frames([math.nan])).codes.tolist() == [Code.SEQ_GAP]


def test_a_stream_that_stands_twice_is_found_before_anything_changes(core: CoreStreams) -> None:
    slots, handles = core.open("a", "b", "c")
    with pytest.raises(RepeatedStream):
        core.admit(handles[[0, 1, 0]], u64(0, 0, 1), ones(1, 3))
    assert core.table.next_seq[slots].tolist() == [0, 0, 0]
    assert resolve_distinct(core.table, OWNER, handles)[0].tolist() == slots.tolist()
    assert resolve_distinct(core.table, OWNER, u64(77, 77))[1].tolist() == [Code.UNKNOWN_STREAM] * 2


def test_a_stream_that_stands_twice_with_the_frame_it_expects_is_refused(core: CoreStreams) -> None:
    slots, handles = core.open("a", "b")
    with pytest.raises(RepeatedStream):
        core.admit(handles[[0, 1, 0]], u64(0, 0, 0), ones(1, 3))
    assert core.table.next_seq[slots].tolist() == [0, 0]


def test_finite_lengths_counts_leading_good_timesteps() -> None:
    x = ones(3, 3)
    x[0, 1] = np.nan
    x[2, 2] = np.inf
    assert finite_lengths(np.isfinite(x)).tolist() == [3, 0, 2]


# ── Frames that were applied before ────────────────────────────────────────────────────────────────────────────────


def test_a_duplicate_is_answered_from_the_ring_and_not_admitted_again(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2, 3]))
    core.compute(slots)
    verdict = core.admit(handles, u64(1), frames([2, 3]))
    assert (verdict.skipped.tolist(), verdict.lengths.tolist(), verdict.codes.tolist()) == ([2], [2], [0])
    assert core.rings.outputs(verdict.rows).ravel().tolist() == [3, 6]
    assert core.table.step_seq[slots].tolist() == [3]
    assert core.table.next_seq[slots].tolist() == [3]


def test_a_column_may_begin_with_repeats_and_end_with_new_frames(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2]))
    core.compute(slots)
    verdict = core.admit(handles, u64(1), frames([2, 3, 4]))
    assert (verdict.skipped.tolist(), verdict.lengths.tolist(), verdict.codes.tolist()) == ([1], [3], [0])
    core.compute(slots)
    assert core.rings.outputs(verdict.rows).ravel().tolist() == [3, 6, 10]


@pytest.mark.parametrize("bit", [0, 22, 31, 32, 63])
def test_one_bit_that_differs_is_a_conflict_from_its_frame_on(core: CoreStreams, bit: int) -> None:
    slots, handles = core.open("a")
    x = frames([1, 2, 3])
    core.admit(handles, u64(0), x)
    core.compute(slots)
    other = x.copy()
    other[1].view(np.uint32)[0, bit // 32] ^= np.uint32(1 << bit % 32)
    verdict = core.admit(handles, u64(0), np.concatenate([other, frames([4])]))
    assert (verdict.skipped.tolist(), verdict.lengths.tolist(), verdict.codes.tolist()) == ([1], [1], [Code.CONFLICT])
    assert verdict.expected_seq.tolist() == [3]
    assert core.table.next_seq[slots].tolist() == [3]


def test_a_repeat_with_another_zero_or_with_nan_is_a_conflict_and_no_other_fault(core: CoreStreams) -> None:
    slots, handles = core.open("a", "b")
    core.admit(handles, u64(0, 0), np.zeros((1, 2, FEATURES), np.float32))
    core.compute(slots)
    x = np.zeros((1, 2, FEATURES), np.float32)
    x[0, 0, 0], x[0, 1, 0] = -0.0, np.nan
    assert core.admit(handles, u64(0, 0), x).codes.tolist() == [Code.CONFLICT] * 2


def test_a_frame_whose_answer_is_pending_is_not_answered_twice(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2]))
    core.step(slots)
    core.step(slots)  # computed, not yet delivered
    verdict = core.admit(handles, u64(0), frames([1, 2, 3]))
    assert (verdict.codes.tolist(), verdict.lengths.tolist()) == ([Code.SEQ_REPEATED], [0])
    assert verdict.expected_seq.tolist() == [2]
    core.compute(slots)
    assert core.admit(handles, u64(0), frames([1, 2, 3])).codes.tolist() == [0]


def test_an_acknowledged_frame_is_not_answered_again(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2]))
    core.compute(slots)
    core.admit(handles, u64(2), frames([3]), acked=u64(1))
    core.compute(slots)
    assert core.admit(handles, u64(0), frames([1])).codes.tolist() == [Code.SEQ_REPEATED]
    assert core.admit(handles, u64(1), frames([2])).codes.tolist() == [0]


def test_an_acknowledgement_is_never_taken_back(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2]))
    core.compute(slots)
    core.admit(handles, u64(2), frames([3]), acked=u64(2))
    core.admit(handles, u64(3), frames([4]), acked=u64(0))
    assert core.table.acked[slots].tolist() == [2]


def test_frames_before_the_streams_first_seq_were_never_applied(core: CoreStreams) -> None:
    slots, handles = core.open("a", first_seqs=[10])
    core.admit(handles, u64(10), frames([1]), acked=u64(10))
    core.compute(slots)
    for seq, code in ((9, Code.SEQ_REPEATED), (10, 0)):
        assert core.admit(handles, u64(seq), frames([1]), acked=u64(seq)).codes.tolist() == [code]


# ── The window ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_beyond_the_window_are_refused_and_those_that_fit_admitted(core: CoreStreams) -> None:
    slots, handles = core.open("a", "b")
    core.admit(handles[1:], u64(0), frames([1, 2]))
    core.compute(slots[1:])
    verdict = core.admit(handles, u64(0, 2), ones(5, 2), acked=u64(0, 1))
    assert verdict.lengths.tolist() == [4, 3]
    assert verdict.codes.tolist() == [Code.WINDOW_FULL] * 2
    assert verdict.expected_seq.tolist() == [4, 5]
    assert core.table.next_seq[slots].tolist() == [4, 5]


def test_the_window_moves_with_what_was_acknowledged_not_with_what_was_computed(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2, 3, 4]))
    core.compute(slots)
    refused = core.admit(handles, u64(4), frames([5]))
    assert (refused.codes.tolist(), refused.lengths.tolist()) == ([Code.WINDOW_FULL], [0])
    assert core.rings.outputs(core.rings.rows(slots, np.arange(4)[:, None])).ravel().tolist() == [1, 3, 6, 10]
    assert core.admit(handles, u64(4), frames([5]), acked=u64(1)).codes.tolist() == [0]


def test_every_output_that_is_not_acknowledged_can_be_had_again(core: CoreStreams) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2, 3]))
    core.compute(slots)
    core.admit(handles, u64(3), frames([4, 5, 6]), acked=u64(2))
    core.compute(slots)
    verdict = core.admit(handles, u64(2), frames([3, 4, 5, 6]), acked=u64(2))
    assert (verdict.skipped.tolist(), verdict.codes.tolist()) == ([4], [0])
    assert core.rings.outputs(verdict.rows).ravel().tolist() == [6, 10, 15, 21]


@pytest.mark.parametrize("acked", [2, 3, 2**63, 2**64 - 1])
def test_an_output_that_was_not_computed_cannot_be_acknowledged(core: CoreStreams, acked: int) -> None:
    slots, handles = core.open("a")
    core.admit(handles, u64(0), frames([1, 2]))
    core.step(slots)
    verdict = core.admit(handles, u64(2), frames([3]), acked=u64(acked))
    assert (verdict.codes.tolist(), verdict.expected_seq.tolist()) == ([Code.ACK_AHEAD], [2])
    assert core.table.acked[slots].tolist() == [0]
    assert core.admit(handles, u64(2), frames([3]), acked=u64(1)).codes.tolist() == [0]


# ── One stream, in plain Python ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Model:
    """What one stream must answer, from the rules alone."""

    window: int
    first: int
    applied: list[float] = field(default_factory=list)
    computed: int = 0
    acked: int = 0
    unanswered: bool = False

    @property
    def next(self) -> int:
        return self.first + len(self.applied)

    def send(self, seq: int, acked: int, values: list[float]) -> tuple[int, int, int]:
        """How many frames are answered, how many of them newly applied, and the code."""
        if acked > self.first + self.computed:
            return 0, 0, Code.ACK_AHEAD
        known, self.acked = self.acked, max(self.acked, acked)
        if seq > self.next:
            return 0, 0, Code.SEQ_GAP
        if seq < self.next and (self.unanswered or seq < max(known, self.first, self.next - self.window)):
            return 0, 0, Code.SEQ_REPEATED
        fresh: list[float] = []
        for at, value in enumerate(values):
            code = self._judge(seq + at, acked, value)
            if code:
                break
            if seq + at >= self.next:
                fresh.append(value)
        else:
            at, code = len(values), 0
        self.applied += fresh
        return at, len(fresh), code

    def _judge(self, seq: int, acked: int, value: float) -> int:
        if seq < self.next and struct.pack("f", value) != struct.pack("f", self.applied[seq - self.first]):
            return Code.CONFLICT
        if seq >= acked + self.window:
            return Code.WINDOW_FULL
        return 0 if math.isfinite(value) else Code.NOT_FINITE


SEND = st.tuples(
    st.integers(-6, 2),  # seq, counted from the expected one
    st.integers(-5, 1),  # acknowledged, counted from what is computed
    st.integers(1, 7),  # timesteps
    st.sampled_from(["right", "right", "right", "other", "nan"]),
    st.integers(0, 6),  # which timestep is wrong
)
EVENT = st.one_of(SEND, st.sampled_from(["step", "step", "answer", "fail"]))


@settings(max_examples=400)
@given(st.integers(1, 5), st.sampled_from([0, 3, 2**62 - 1]), st.lists(EVENT, max_size=30))
def test_one_stream_is_judged_as_in_plain_python(
    window: int, first: int, events: list[tuple[int, int, int, str, int] | str]
) -> None:
    core = CoreStreams(window)
    _, neighbour = core.open("neighbour", first_seqs=[1])  # a column that is refused: judged without short cuts
    slots, handles = core.open("s", first_seqs=[first])
    model = Model(window, first, acked=first)
    for event in events:
        if isinstance(event, tuple):
            from_next, from_computed, timesteps, how, wrong = event
            seq, acked = max(0, model.next + from_next), max(0, first + model.computed + from_computed)
            values = [float(1 + (seq + at) % 97) for at in range(timesteps)]
            if how == "other":
                values[wrong % timesteps] += 0.5
            elif how == "nan":
                values[wrong % timesteps] = math.nan
            before = list(model.applied)
            length, fresh, code = model.send(seq, acked, values)
            alone = how == "right"
            x = frames(values) if alone else np.concatenate([frames(values), ones(timesteps, 1)], axis=1)
            sent = (
                (handles, u64(seq), u64(acked))
                if alone
                else (np.concatenate([handles, neighbour]), u64(seq, 5), u64(acked, 0))
            )
            verdict = core.admit(sent[0], sent[1], x, acked=sent[2])
            assert (verdict.lengths[0], verdict.codes[0]) == (length, code)
            assert verdict.lengths[0] - verdict.skipped[0] == fresh
            assert verdict.expected_seq[0] == model.next
            model.unanswered |= fresh > 0
            if length:
                again = core.rings.outputs(verdict.rows[:length, :1]).ravel().tolist()
                for at in range(int(verdict.skipped[0])):
                    assert again[at] == sum(before[: seq + at - first + 1])
        elif event == "answer":
            if model.computed == len(model.applied):
                core.table.pending[slots] = 0
                model.unanswered = False
        elif model.computed < len(model.applied):
            if event == "step":
                core.step(slots)
                model.computed += 1
            else:
                core.rings.take(slots)
                core.rings.failed(slots)
                del model.applied[model.computed :]
    assert core.table.next_seq[slots].tolist() == [model.next]
    assert core.table.step_seq[slots].tolist() == [first + model.computed]
    assert core.table.acked[slots].tolist() == [model.acked]
    assert core.rings.pending_count == len(model.applied) - model.computed
    for seq in range(max(first, model.acked), first + model.computed):  # what the client may still ask for
        at = seq - first
        output = core.rings.outputs(core.rings.rows(slots, np.array([seq]))).item()
        assert output == sum(model.applied[: at + 1])
