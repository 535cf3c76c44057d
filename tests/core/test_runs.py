from __future__ import annotations

import numpy as np
import pytest

from instep.core.runs import are_pending, are_running
from instep_client.protocol.codes import Code
from tests.support.core_streams import Answered, CoreStreams, check_invariants, frames, ints


@pytest.fixture
def core() -> CoreStreams:
    return CoreStreams()


def test_frames_are_stepped_in_the_order_of_their_seqs(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.send((a, 0, 0), x=frames([10, 11]))
    core.send((b, 0, 0), x=frames([20]))
    core.send((a, 2, 0), x=frames([12]))
    firsts = []
    while core.ready:
        batch = core.step()
        firsts.append(core.tables.x[batch.rows[0], 0].tolist())
    assert firsts == [[10, 20], [11], [12]]


def test_a_message_is_complete_when_its_last_frame_is_stepped(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2], [3, 4]))
    core.step()
    assert core.answer() == []
    core.step()
    (answer,) = core.answer()
    assert answer.columns == [Answered(0, 2, 2, [1, 3]), Answered(0, 2, 2, [3, 7])]


def test_several_messages_complete_in_one_run(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    for seq in range(3):
        core.send((a, seq, 0), x=frames([1]))
        core.send((b, seq, 0), x=frames([1]))
    core.step(max_steps=8)
    assert len(core.answer()) == 6


def test_what_is_pending_and_running_is_told_until_it_is_answered(core: CoreStreams) -> None:
    a, _ = core.open("a", "b")
    packed = tuple(core.tables)
    core.send((a, 0, 0), x=frames([1]))
    assert are_pending(packed, ints(2, 1))
    assert not are_running(packed, ints(2, 1))
    batch = core.begin()
    assert are_running(packed, ints(2, 1))
    assert not are_running(packed, ints(2))
    core.finish(batch)
    assert not are_running(packed, ints(2, 1))
    assert are_pending(packed, ints(2, 1)), "it is stepped and not answered"
    core.answer()
    assert not are_pending(packed, ints(2, 1))
    assert not are_pending(packed, ints())


# ── Failed steps ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_step_fails_its_frame_and_everything_behind_it(core: CoreStreams) -> None:
    a, b = core.open("a", "b")
    core.send((a, 0, 0), (b, 0, 0), x=frames([1, 2], [3, 4]))
    core.send((a, 2, 0), x=frames([5]))
    core.fail(core.begin(max_batch_size=1).slots)
    check_invariants(core)
    assert (core.table.next_seq[1], core.pending) == (0, 2)
    (behind,) = core.answer()
    assert behind.columns == [Answered(Code.SEQ_GAP, 0, 0, [])]
    (answer,) = core.step_all()
    assert answer.columns == [Answered(Code.STEP_FAILED, 0, 0, []), Answered(0, 2, 2, [3, 7])]
    core.send((a, 0, 0), x=frames([1]))
    assert core.step_all()[0].columns == [Answered(0, 1, 1, [1])]


def test_a_run_that_fails_after_some_steps_keeps_those(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2, 3, 4]))
    batch = core.begin(max_steps=3)
    core.compute(batch, 1)
    core.finish(batch, 1, is_over=False)
    assert core.begin().slots.tolist() == [], "the run is not over"
    core.fail(batch.slots)
    check_invariants(core)
    assert core.answer()[0].columns == [Answered(Code.STEP_FAILED, 1, 1, [1])]
    assert (core.pending, core.ready) == (0, 0)


def test_everything_behind_a_lost_state_fails_for_the_same_reason(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1]))
    core.send((a, 1, 0), x=frames([2]))
    core.table.lost[1] = True
    core.fail(ints(1), Code.STATE_LOST)
    codes = [column.code for answer in core.answer() for column in answer.columns]
    assert codes == [Code.STATE_LOST] * 2


def test_a_refusal_behind_a_frame_that_fails_gives_way_to_its_reason(core: CoreStreams) -> None:
    (a,) = core.open("a")
    assert core.send((a, 0, 0), x=frames([1, 2, np.nan])) == [Code.NOT_FINITE]
    core.fail(core.begin().slots)
    assert core.answer()[0].columns == [Answered(Code.STEP_FAILED, 0, 0, [])]


def test_repeats_before_a_frame_that_fails_are_answered(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2]))
    core.step_all()
    core.send((a, 0, 0), x=frames([1, 2, 3]))
    core.fail(core.begin().slots)
    assert core.answer()[0].columns == [Answered(Code.STEP_FAILED, 2, 2, [1, 3])]


def test_a_frame_that_failed_may_be_sent_again_with_other_values(core: CoreStreams) -> None:
    (a,) = core.open("a")
    core.send((a, 0, 0), x=frames([1, 2, 3, 4]))
    core.step_all()
    core.send((a, 4, 1), x=frames([9]))
    core.fail(core.begin().slots)
    core.answer()
    assert core.send((a, 4, 1), x=frames([5])) == [0]
    assert core.step_all()[0].columns == [Answered(0, 1, 5, [15])]
    assert core.send((a, 1, 1), x=frames([2, 3, 4, 5])) == [0]
    assert core.answer()[0].columns == [Answered(0, 4, 5, [3, 6, 10, 15])]


def test_streams_that_have_nothing_pending_fail_nothing(core: CoreStreams) -> None:
    core.open("a")
    core.fail(ints(1))
    assert core.complete == []
    check_invariants(core)
