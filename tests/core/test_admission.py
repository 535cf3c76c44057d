from __future__ import annotations

import math

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from tests.support.core_streams import FEATURES, OWNER, Answered, CoreStreams, Sent, check_invariants, frames, ints

W = 4
TINY = 1e-42  # a denormal


@pytest.fixture
def core() -> CoreStreams:
    return CoreStreams(W)


def test_a_good_message_is_admitted_whole_and_moves_the_expected_seq(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    assert core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2, 3], [4, 5, 6])) == [0, 0]
    assert core.table.next_seq[[1, 2]].tolist() == [3, 3]
    assert core.inputs(1, 0, 1, 2) == [1, 2, 3]
    assert core.inputs(2, 0, 1, 2) == [4, 5, 6]
    (answer,) = core.step_all()
    assert answer.columns == [Answered(0, 3, 3, [1, 3, 6]), Answered(0, 3, 3, [4, 9, 15])]


@pytest.mark.parametrize("seq", [4, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seq_beyond_the_expected_one_is_a_gap(core: CoreStreams, seq: int) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([0, 1, 2]))
    assert core.send((a, seq, 0), x=frames([9])) == [Code.SEQ_GAP]
    assert core.table.next_seq[1] == 3
    refused, _ = core.step_all()
    assert refused.columns == [Answered(Code.SEQ_GAP, 0, 3, [])]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_bad_frame_stops_its_own_column_only(core: CoreStreams, bad: float) -> None:
    handles = core.open("a", "b", "c")
    x = frames(*[[1, 2, 3, 4]] * 3)
    x[2, 1, 1] = bad
    assert core.send(*((handle, 0, 0) for handle in handles), x=x) == [0, Code.NOT_FINITE, 0]
    assert core.table.next_seq[1:4].tolist() == [4, 2, 4]
    (answer,) = core.step_all()
    assert [(column.length, column.expected_seq) for column in answer.columns] == [(4, 4), (2, 2), (4, 4)]


@pytest.mark.parametrize("value", [TINY, -TINY, -0.0, np.finfo(np.float32).max, np.finfo(np.float32).tiny])
def test_every_finite_value_is_good_down_to_the_last_bit(core: CoreStreams, value: float) -> None:
    (a,) = core.open("a")
    x = np.full((1, 1, FEATURES), value, np.float32)
    assert core.send((a, 0, 0), x=x) == [0]
    assert core.tables.x[core.begin().rows[0]].tobytes() == x.tobytes()


def test_a_foreign_streams_seq_is_neither_moved_nor_told(core: CoreStreams) -> None:
    (theirs,) = core.open("theirs", owner=2, first_seqs=[7])
    assert core.send((theirs, 7, 7), x=frames([1])) == [Code.FOREIGN_STREAM]
    assert core.answer()[0].columns == [Answered(Code.FOREIGN_STREAM, 0, 0, [])]
    assert core.table.next_seq[1] == 7


def test_a_fenced_handle_neither_steps_nor_acknowledges_nor_is_told_the_seq(core: CoreStreams) -> None:
    (former,) = core.open("a", first_seqs=[7])
    core.table.hand_over(ints(1), OWNER, now_ns=0)
    (present,) = core.handles(ints(1))
    assert core.send((former, 7, 7), (present, 7, 0), x=frames([1], [1])) == [Code.FENCED, Code.WINDOW_FULL]
    assert [column.expected_seq for column in core.answer()[0].columns] == [0, 7]
    assert core.table.next_seq[1] == 7


def test_unknown_columns_beside_a_good_one(core: CoreStreams) -> None:
    (a,) = core.open("a")
    unknown = [(0, 0, 0), (99, 0, 0), (2**64 - 1, 0, 0), (a ^ 1 << 40, 0, 0), (8 << 32 | 2, 0, 0), (7 << 32, 0, 0)]
    codes = core.send(*unknown, (a, 0, 0), x=frames(*[[1]] * 7))
    assert codes == [Code.UNKNOWN_STREAM] * 6 + [0]
    assert core.table.next_seq.tolist() == [0, 1] + [0] * 7


def test_seq_is_judged_before_values(core: CoreStreams) -> None:
    (a,) = core.open("a")
    assert core.send((a, 3, 0), x=frames([math.nan])) == [Code.SEQ_GAP]


def test_a_stream_named_twice_is_found_before_anything_changes(core: CoreStreams) -> None:
    a, b, _ = core.open("a", "b", "c")
    before = [array.copy() for array in core.tables[2:8]]
    for columns in (((a, 0, 0), (b, 0, 0), (a, 1, 0)), ((a, 0, 0), (b, 0, 0), (a, 0, 0))):
        core.send(*columns, x=frames([1], [1], [1]))
        assert core.refusals == [Code.REPEATED_STREAM]
    for array, old in zip(core.tables[2:8], before, strict=True):
        assert array.tobytes() == old.tobytes()
    assert core.send((99, 0, 0), (99, 0, 0), (a, 0, 0), x=frames([1], [1], [1])) == [Code.UNKNOWN_STREAM] * 2 + [0]


# ── Frames that were applied before ────────────────────────────────────────────────────────────────────────────────


def test_a_duplicate_is_answered_from_the_frame_buffer_and_not_admitted_again(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2, 3]))
    core.step_all()
    assert core.send((a, 1, 0), x=frames([2, 3])) == [0]
    assert core.ready == core.pending == 0
    (answer,) = core.answer()
    assert answer.columns == [Answered(0, 2, 3, [3, 6])]
    assert (core.table.step_seq[1], core.table.next_seq[1]) == (3, 3)


def test_a_column_may_begin_with_repeats_and_end_with_new_frames(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step_all()
    assert core.send((a, 1, 0), x=frames([2, 3, 4])) == [0]
    assert core.pending == 2
    (answer,) = core.step_all()
    assert answer.columns == [Answered(0, 3, 4, [3, 6, 10])]


def test_repeated_outputs_are_those_of_admission_though_their_rows_are_used_again(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step_all()
    core.hold(2)
    core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2], [5, 5]))  # waits for `b`
    core.send((a, 2, 2), x=frames([3, 4, 5, 6]))  # in the meantime `a` has read its outputs elsewhere
    core.step_all()
    core.release(2)
    (answer,) = core.step_all()
    assert answer.columns == [Answered(0, 2, 2, [1, 3]), Answered(0, 2, 2, [5, 10])]


@pytest.mark.parametrize("bit", [0, 22, 31, 32, 63])
def test_one_bit_that_differs_is_a_conflict_from_its_frame_on(core: CoreStreams, bit: int) -> None:
    (a,) = core.open("a")
    x = frames([1, 2, 3])
    core.send((a, 0, 0), x=x)
    core.step_all()
    other = x.copy()
    other[1].view(np.uint32)[0, bit // 32] ^= np.uint32(1 << bit % 32)
    assert core.send((a, 0, 0), x=np.concatenate([other, frames([4])])) == [Code.CONFLICT]
    assert core.step_all()[0].columns == [Answered(Code.CONFLICT, 1, 3, [1])]
    assert core.inputs(1, 0, 1, 2) == [1, 2, 3]


def test_bytes_are_compared_before_window_and_finite_values(core: CoreStreams) -> None:
    handles = core.open("a", "b")
    core.send(*((handle, 0, 0) for handle in handles), x=np.zeros((1, 2, FEATURES), np.float32))
    core.step_all()
    x = np.zeros((1, 2, FEATURES), np.float32)
    x[0, 0, 0], x[0, 1, 0] = -0.0, np.nan
    assert core.send(*((handle, 0, 0) for handle in handles), x=x) == [Code.CONFLICT] * 2
    far = CoreStreams(W)
    (a,) = far.open("a")
    far.send((a, 0, 0), x=frames([1, 2, 3, 4]))
    far.step_all()
    assert far.send((a, 0, 0), x=frames([1, 2, 3, 5, 6])) == [Code.CONFLICT]
    assert far.send((a, 0, 0), x=frames([1, 2, 3, 4, math.nan])) == [Code.NOT_FINITE]


def test_a_frame_whose_answer_is_pending_is_not_answered_twice(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step()
    core.step()  # computed, not yet delivered
    assert core.send((a, 0, 0), x=frames([1, 2, 3])) == [Code.SEQ_REPEATED]
    refused, _ = core.answer()
    assert refused.columns == [Answered(Code.SEQ_REPEATED, 0, 2, [])]
    assert core.send((a, 0, 0), x=frames([1, 2, 3])) == [0]


def test_an_acknowledged_frame_is_not_answered_again(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step_all()
    core.send((a, 2, 1), x=frames([3]))
    core.step_all()
    assert core.send((a, 0, 0), x=frames([1])) == [Code.SEQ_REPEATED]
    assert core.send((a, 1, 0), x=frames([2])) == [0]


def test_an_acknowledgement_is_never_taken_back(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step_all()
    core.send((a, 2, 2), x=frames([3]))
    core.send((a, 3, 0), x=frames([4]))
    assert core.table.acked[1] == 2


def test_frames_before_the_streams_first_seq_were_never_applied(core: CoreStreams) -> None:
    (a,) = core.open("a", first_seqs=[10])
    core.send((a, 10, 10), x=frames([1]))
    core.step_all()
    assert core.send((a, 9, 9), x=frames([1])) == [Code.SEQ_REPEATED]
    assert core.send((a, 10, 10), x=frames([1])) == [0]


# ── The window ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_beyond_the_window_are_refused_and_those_that_fit_admitted(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.send((b, 0, 0), x=frames([1, 2]))
    core.step_all()
    assert core.send((a, 0, 0), (b, 2, 1), x=frames([1] * 5, [1] * 5)) == [Code.WINDOW_FULL] * 2
    assert core.table.next_seq[[1, 2]].tolist() == [4, 5]
    (answer,) = core.step_all()
    assert [(column.length, column.expected_seq) for column in answer.columns] == [(4, 4), (3, 5)]


def test_the_window_moves_with_what_was_acknowledged_not_with_what_was_computed(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2, 3, 4]))
    core.step_all()
    assert core.send((a, 4, 0), x=frames([5])) == [Code.WINDOW_FULL]
    assert core.send((a, 0, 0), x=frames([1, 2, 3, 4])) == [0]
    assert core.answer()[1].columns == [Answered(0, 4, 4, [1, 3, 6, 10])]
    assert core.send((a, 4, 1), x=frames([5])) == [0]


@pytest.mark.parametrize("acked", [2, 3, 2**63, 2**64 - 1])
def test_an_output_that_was_not_computed_cannot_be_acknowledged(core: CoreStreams, acked: int) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step()
    assert core.send((a, 2, acked), x=frames([3])) == [Code.ACK_AHEAD]
    assert core.answer()[0].columns == [Answered(Code.ACK_AHEAD, 0, 2, [])]
    assert core.table.acked[1] == 0
    assert core.send((a, 2, 1), x=frames([3])) == [0]


# ── Messages that are refused as a whole ───────────────────────────────────────────────────────────────────────────


def test_a_message_that_exceeds_what_may_be_pending_is_refused_whole() -> None:
    core = CoreStreams(W, max_pending=5)
    a, b, c = core.open("a", "b", "c")
    core.send((a, 0, 0), x=frames([1, 2, 3]))
    for columns, x in ((((b, 0, 0),), frames([1, 2, 3])), (((b, 0, 0), (c, 0, 0), (99, 0, 0)), frames([1], [1], [1]))):
        assert core.send(*columns, x=x) == []
        assert core.refusals == [Code.BUSY]
    assert core.table.next_seq.tolist()[1:4] == [3, 0, 0]
    assert core.send((b, 0, 0), (c, 0, 0), x=frames([1], [1])) == [0, 0]
    assert (core.pending, core.refusals) == (5, [0])
    check_invariants(core)
    core.step_all()
    assert core.send((b, 1, 0), x=frames([1, 2, 3])) == [0]


def test_a_message_that_can_never_fit_leaves_everything_alone() -> None:
    core = CoreStreams(W, max_pending=3)
    handles = core.open("a", "b", "c", "d")
    core.send(*((handle, 0, 0) for handle in handles), x=frames([1], [2], [3], [4]))
    core.send((handles[0], 0, 0), x=frames([1, 2, 3, 4]))
    assert core.refusals == [Code.BUSY]
    check_invariants(core)
    assert core.send(*((handle, 0, 0) for handle in handles[:3]), x=frames([1], [2], [3])) == [0, 0, 0]
    check_invariants(core)
    assert len(core.step_all()) == 1


def test_every_record_may_be_in_use_at_once_and_comes_back() -> None:
    core = CoreStreams(W, max_pending=8)
    handles = core.open(*"abcdefgh")
    for lap in range(3):
        for handle in handles:
            assert core.send((handle, lap, lap), x=frames([1])) == [0]
        core.send((handles[0], lap + 1, lap), x=frames([1]))
        assert core.refusals == [Code.BUSY]
        check_invariants(core)
        assert len(core.step_all()) == 8
        check_invariants(core)


def test_an_origins_unanswered_frames_are_bounded_by_its_credit_and_others_are_not_concerned() -> None:
    core = CoreStreams(W, credit=3)
    a, b = core.open("a", "b")
    (theirs,) = core.open("theirs", owner=2)
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step()  # one is computed, none answered
    core.send((b, 0, 0), x=frames([1, 2]))
    assert core.refusals == [Code.BUSY]
    core.admit(Sent([(theirs, 0, 0)], frames([1, 2]), origin=2))
    assert core.refusals == [0]
    core.step_all()
    core.tables.origins["backlog"][OWNER] = 2  # answered, and still with its transport
    core.send((b, 0, 0), x=frames([1, 2]))
    assert core.refusals == [Code.BUSY]
    core.tables.origins["backlog"][OWNER] = 1
    core.send((b, 0, 0), x=frames([1, 2]))
    assert core.refusals == [0]


def test_messages_admitted_together_are_judged_as_one_after_the_other(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    codes = core.admit(
        Sent([(a, 0, 0)], frames([1, 2]), tag=1),
        Sent([(a, 2, 0), (a, 3, 0)], frames([3], [3]), tag=2),  # refused: its columns and frames are stepped over
        Sent([(a, 2, 0), (b, 1, 0)], frames([3], [9]), tag=3),
        Sent([(b, 0, 0)], frames([5]), tag=4),
    )
    assert core.refusals == [0, Code.REPEATED_STREAM, 0, 0]
    assert codes == [0, 0, Code.SEQ_GAP, 0]
    answers = {answer.tag: answer.columns for answer in core.step_all()}
    assert answers == {
        1: [Answered(0, 2, 2, [1, 3])],
        3: [Answered(0, 1, 3, [6]), Answered(Code.SEQ_GAP, 0, 0, [])],
        4: [Answered(0, 1, 1, [5])],
    }


def test_a_message_of_an_origin_that_left_is_ignored_whoever_has_its_number(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.tables.origins["arrival"][OWNER] = 2
    core.admit(Sent([(a, 0, 0)], frames([1]), arrival=1, tag=1), Sent([(b, 0, 0)], frames([1]), arrival=2, tag=2))
    assert core.refusals == [0, 0]
    assert [answer.tag for answer in core.step_all()] == [2]
    check_invariants(core)


# ── Handles ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_handles_of_an_operation_are_resolved_each_by_itself(core: CoreStreams) -> None:
    (mine,) = core.open("mine")
    (theirs,) = core.open("theirs", owner=2)
    codes = core.resolve([mine, theirs, 12345, 0, 2**64 - 1])
    assert codes == [0, Code.FOREIGN_STREAM] + [Code.UNKNOWN_STREAM] * 3


def test_an_operation_that_names_an_own_stream_twice_is_told_so(core: CoreStreams) -> None:
    mine, other = core.open("mine", "other")
    (theirs,) = core.open("theirs", owner=2)
    assert core.names_one_twice([mine, other, mine])
    assert not core.names_one_twice([mine, other])
    assert not core.names_one_twice([theirs, theirs, 77, 77])
