"""The rules of runs and replies, broken one by one: their tests notice each.

Compiled kernels are broken from outside, by what they are given or what they leave behind, so that every rule is broken
whether kernels are compiled or not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from instep.core.replies import assemble, repeated_outputs
from instep.core.runs import fail_run, finish_run, release
from instep.core.scheduler import begin_run
from instep.core.tables import NOTHING, ROUND_TAIL, Packed, Tables
from instep.core.typing import F32, I64
from tests.core import test_admission, test_replies, test_runs, test_scheduler
from tests.support.broken_rules import BrokenRule, check_is_found
from tests.support.core_streams import CoreStreams

pytestmark = pytest.mark.long


def nothing_held(original: Any, packed: Packed, *arguments: Any) -> Any:
    holds = Tables(*packed).streams["holds"]
    before = holds.copy()
    holds[:] = 0
    result = original(packed, *arguments)
    holds[:] = before
    return result


def not_running(original: Any, packed: Packed, *arguments: Any) -> Any:
    size, steps = original(packed, *arguments)
    tables = Tables(*packed)
    tables.streams["running"][tables.run_slots[:size]] = 0
    return size, steps


def same_turn_again(original: Any, packed: Packed, *arguments: Any) -> Any:
    counts, ready_head = Tables(*packed).counts, Tables(*packed).origins["ready_head"]
    before = counts[ROUND_TAIL]
    result = original(packed, *arguments)
    if before != NOTHING and ready_head[before] != NOTHING:
        counts[ROUND_TAIL] = before
    return result


def not_ready_again(original: Any, packed: Packed, slots: I64, steps: int, now_ns: int, is_over: bool) -> Any:
    count = original(packed, slots, steps, now_ns, False)
    Tables(*packed).streams["running"][slots] = 0
    return count


def same_reason_for_all(original: Any, packed: Packed, slots: I64, code: int) -> Any:
    Tables(*packed).streams["lost"][slots] = 1
    return original(packed, slots, code)


def expected_seq_not_moved_back(original: Any, packed: Packed, slots: I64, code: int) -> Any:
    next_seq = Tables(*packed).streams["next_seq"]
    before = next_seq[slots]
    count = original(packed, slots, code)
    next_seq[slots] = before
    return count


def released_at_once(original: Any, packed: Packed, slots: I64, now_ns: int) -> None:
    Tables(*packed).streams["holds"][slots] = 1
    original(packed, slots, now_ns)


def zeros_for_what_is_missing(original: Any, packed: Packed, *arguments: Any) -> Any:
    result, y = original(packed, *arguments), Tables(*packed).reply_y
    y[:] = np.nan_to_num(y)
    return result


def nothing_kept(original: Any, packed: Packed, number: int) -> tuple[F32, I64]:
    y, skipped = original(packed, number)
    return y, np.zeros_like(skipped)


def newest_first(original: Any, packed: Packed, numbers: Any, began_ns: int, *rest: Any) -> Any:
    return original(packed, numbers[::-1].copy(), began_ns, *rest)


RULES = (
    BrokenRule(
        "a held stream steps",
        begin_run,
        nothing_held,
        [test_scheduler.test_a_held_stream_loses_its_turn_and_has_it_again_when_it_is_released],
    ),
    BrokenRule(
        "two frames of a stream are in runs at once",
        begin_run,
        not_running,
        [test_scheduler.test_a_stream_in_a_run_is_in_no_other_batch],
    ),
    BrokenRule(
        "a batch is larger than it may be",
        begin_run,
        lambda original, packed, max_batch_size, max_steps: original(packed, max_batch_size + 1, max_steps),
        [test_scheduler.test_streams_of_one_origin_step_first_in_first_out],
    ),
    BrokenRule(
        "a run has more steps than one of its streams has frames",
        begin_run,
        lambda original, *arguments: (original(*arguments)[0], arguments[-1]),
        [test_scheduler.test_a_run_takes_several_frames_of_each_stream_as_far_as_all_of_them_have_frames],
    ),
    BrokenRule(
        "each batch begins with the same origin",
        begin_run,
        same_turn_again,
        [test_scheduler.test_busy_origins_take_turns],
    ),
    BrokenRule(
        "a stream with more frames is forgotten after a run",
        finish_run,
        not_ready_again,
        [partial(test_runs.test_frames_are_stepped_in_the_order_of_their_seqs, core=CoreStreams())],
    ),
    BrokenRule(
        "frames behind one that failed are said to have failed themselves",
        fail_run,
        same_reason_for_all,
        [partial(test_runs.test_a_failed_step_fails_its_frame_and_everything_behind_it, core=CoreStreams())],
    ),
    BrokenRule(
        "the expected seq is not moved back after a failed step",
        fail_run,
        expected_seq_not_moved_back,
        [partial(test_runs.test_a_failed_step_fails_its_frame_and_everything_behind_it, core=CoreStreams())],
    ),
    BrokenRule(
        "one release undoes all holds",
        release,
        released_at_once,
        [test_scheduler.test_a_held_stream_loses_its_turn_and_has_it_again_when_it_is_released],
    ),
    BrokenRule(
        "a frame that was not applied has an output",
        assemble,
        zeros_for_what_is_missing,
        [test_replies.test_columns_that_were_refused_are_nan_and_their_neighbours_are_not],
    ),
    BrokenRule(
        "replies are out of order",
        assemble,
        newest_first,
        [test_replies.test_messages_of_one_origin_and_length_are_answered_together],
    ),
    BrokenRule(
        "a repeat is answered from a row that is used again",
        repeated_outputs,
        nothing_kept,
        [
            partial(
                test_admission.test_repeated_outputs_are_those_of_admission_though_their_rows_are_used_again,
                core=CoreStreams(test_admission.W),
            )
        ],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
