"""The rules of the core, broken one by one: the tests of the core notice each.

Compiled kernels are broken from outside, by what they are given or what they leave behind, so that every rule is broken
whether kernels are compiled or not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from instep.core.admission import admit
from instep.core.dirty import DirtyTracker
from instep.core.ownership import ResumeDecision, check_resume
from instep.core.replies import assemble, repeated_outputs
from instep.core.runs import fail_run, finish_run, release
from instep.core.scheduler import begin_run
from instep.core.slots import SlotAllocator
from instep.core.streams import StreamTable
from instep.core.tables import CREDIT, MAX_PENDING, NOTHING, ROUND_TAIL, Packed, Tables, rows_of
from instep.core.typing import F32, I64, U32
from instep_client.protocol.codes import Code
from tests.core import (
    test_admission,
    test_dirty,
    test_ownership,
    test_replies,
    test_runs,
    test_scheduler,
    test_slots,
    test_streams,
)
from tests.support.broken_rules import BrokenRule, check_is_found
from tests.support.core_streams import CoreStreams

# ── Admission, given something else ────────────────────────────────────────────────────────────────────────────────


def slots_of(sent: Any, packed: Packed) -> I64:
    """The slots that handles name, the scratch slot where there is none."""
    slots: I64 = (sent["handle"] & 0xFFFF_FFFF).astype(np.int64)
    return np.where(slots < len(Tables(*packed).streams), slots, 0)


def finite(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    return original(packed, messages, sent, np.nan_to_num(x.view(np.float32)).view(np.uint32))


def bad_for_all_columns(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    """Of one message."""
    shape = messages["timesteps"][0], messages["width"][0], -1
    values = x.view(np.float32).reshape(shape).copy()
    values[np.isnan(values).any(axis=(1, 2))] = np.nan
    return original(packed, messages, sent, values.view(np.uint32).ravel())


def no_gaps(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    next_seq = Tables(*packed).streams["next_seq"][slots_of(sent, packed)]
    sent["seq"] = np.where(sent["seq"] > next_seq, next_seq, sent["seq"])
    return original(packed, messages, sent, x)


def no_conflicts(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    """Of a message with one column."""
    tables, (slot,), x = Tables(*packed), slots_of(sent, packed), x.copy()
    repeats = max(0, int(tables.streams["next_seq"][slot] - sent["seq"][0]))
    held = tables.x[rows_of(tables, slot, sent["seq"][0] + np.arange(repeats))].view(np.uint32).ravel()
    x[: len(held)] = held[: len(x)]
    return original(packed, messages, sent, x)


def acknowledged_later(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    computed = Tables(*packed).streams["step_seq"][slots_of(sent, packed)]
    sent["acked"] = np.minimum(sent["acked"] + 1, np.maximum(sent["acked"], computed))
    return original(packed, messages, sent, x)


def acknowledged_as_far_as_computed(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    computed = Tables(*packed).streams["step_seq"][slots_of(sent, packed)]
    sent["acked"] = np.where(sent["acked"] < 0, computed, np.minimum(sent["acked"], computed))
    return original(packed, messages, sent, x)


def acknowledgement_taken_back(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    result = original(packed, messages, sent, x)
    Tables(*packed).streams["acked"][slots_of(sent, packed)] = sent["acked"]
    return result


def second_name_ignored(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    _, first = np.unique(sent["handle"], return_index=True)
    sent["handle"][np.setdiff1d(np.arange(len(sent)), first)] = 99
    return original(packed, messages, sent, x)


def whoever_owns_it(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    messages["origin"] = Tables(*packed).streams["owner"][slots_of(sent, packed)[0]]
    return original(packed, messages, sent, x)


def newest_handle(original: Any, packed: Packed, messages: Any, sent: Any, x: U32) -> Any:
    sent["handle"][0] = Tables(*packed).streams["handle"][slots_of(sent, packed)[0]]
    return original(packed, messages, sent, x)


def without_limit(limit: int) -> Any:
    def variant(original: Any, packed: Packed, *arguments: Any) -> Any:
        counts = Tables(*packed).counts
        usual, counts[limit] = counts[limit], 10**6
        result = original(packed, *arguments)
        counts[limit] = usual
        return result

    return variant


def nothing_pending(original: Any, packed: Packed, *arguments: Any) -> Any:
    pending = Tables(*packed).streams["unanswered"]
    before = pending.copy()
    pending[:] = 0
    result = original(packed, *arguments)
    pending += before
    return result


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── Replies ────────────────────────────────────────────────────────────────────────────────────────────────────────


def zeros_for_what_is_missing(original: Any, packed: Packed, *arguments: Any) -> Any:
    result, y = original(packed, *arguments), Tables(*packed).reply_y
    y[:] = np.nan_to_num(y)
    return result


def nothing_kept(original: Any, packed: Packed, number: int) -> tuple[F32, I64]:
    y, skipped = original(packed, number)
    return y, np.zeros_like(skipped)


def newest_first(original: Any, packed: Packed, numbers: Any, began_ns: int, *rest: Any) -> Any:
    return original(packed, numbers[::-1].copy(), began_ns, *rest)


# ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────────


def same_epoch(original: Any, table: StreamTable, slots: I64, *arguments: Any, **named: Any) -> None:
    epochs = table.epoch[slots]
    original(table, slots, *arguments, **named)
    table.epoch[slots] = epochs


def same_handles(original: Any, slots: SlotAllocator, renewed: I64) -> None:
    """The handles stay as they were, also when a slot is released."""


def as_if_no_frame_was_sent(original: Any, table: StreamTable, *arguments: Any) -> ResumeDecision:
    table.granted_seq[:] = table.next_seq
    decision: ResumeDecision = original(table, *arguments)
    return decision


def whichever_connection(original: Any, *arguments: Any) -> ResumeDecision:
    decision: ResumeDecision = original(*arguments[:-1], 10**9)
    return decision


def never(code: Code) -> Any:
    def variant(original: Any, *arguments: Any) -> ResumeDecision:
        decision: ResumeDecision = original(*arguments)
        decision.codes[decision.codes == code] = 0
        return decision

    return variant


def on_core(test: Any, **arguments: Any) -> Any:
    return partial(test, core=CoreStreams(test_admission.W), **arguments)


RULES = (
    BrokenRule(
        "NaN is applied",
        admit,
        finite,
        [on_core(test_admission.test_a_bad_frame_stops_its_own_column_only, bad=np.nan)],
    ),
    BrokenRule(
        "one bad frame fails the whole message",
        admit,
        bad_for_all_columns,
        [on_core(test_admission.test_a_bad_frame_stops_its_own_column_only, bad=np.nan)],
    ),
    BrokenRule(
        "a frame behind a gap is applied",
        admit,
        no_gaps,
        [on_core(test_admission.test_a_seq_beyond_the_expected_one_is_a_gap, seq=4)],
    ),
    BrokenRule(
        "other bytes under a seq that was applied are taken for a repeat",
        admit,
        no_conflicts,
        [on_core(test_admission.test_one_bit_that_differs_is_a_conflict_from_its_frame_on, bit=31)],
    ),
    BrokenRule(
        "the window is a frame longer",
        admit,
        acknowledged_later,
        [on_core(test_admission.test_the_window_moves_with_what_was_acknowledged_not_with_what_was_computed)],
    ),
    BrokenRule(
        "an output that was not computed is acknowledged",
        admit,
        acknowledged_as_far_as_computed,
        [on_core(test_admission.test_an_output_that_was_not_computed_cannot_be_acknowledged, acked=2)],
    ),
    BrokenRule(
        "an acknowledgement is taken back",
        admit,
        acknowledgement_taken_back,
        [on_core(test_admission.test_an_acknowledgement_is_never_taken_back)],
    ),
    BrokenRule(
        "a stream that is named twice is stepped",
        admit,
        second_name_ignored,
        [on_core(test_admission.test_a_stream_named_twice_is_found_before_anything_changes)],
    ),
    BrokenRule(
        "an origin steps the stream of another",
        admit,
        whoever_owns_it,
        [on_core(test_admission.test_a_foreign_streams_seq_is_neither_moved_nor_told)],
    ),
    BrokenRule(
        "a fenced handle is still good",
        admit,
        newest_handle,
        [on_core(test_admission.test_a_fenced_handle_neither_steps_nor_acknowledges_nor_is_told_the_seq)],
    ),
    BrokenRule(
        "an origin has no bound of unanswered frames",
        admit,
        without_limit(CREDIT),
        [test_admission.test_an_origins_unanswered_frames_are_bounded_by_its_credit_and_others_are_not_concerned],
    ),
    BrokenRule(
        "pending frames have no bound",
        admit,
        without_limit(MAX_PENDING),
        [test_admission.test_a_message_that_exceeds_what_may_be_pending_is_refused_whole],
    ),
    BrokenRule(
        "a frame is answered twice while its answer is pending",
        admit,
        nothing_pending,
        [on_core(test_admission.test_a_frame_whose_answer_is_pending_is_not_answered_twice)],
    ),
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
        [on_core(test_admission.test_repeated_outputs_are_those_of_admission_though_their_rows_are_used_again)],
    ),
    BrokenRule(
        "the handle of a slot's former stream is good for the next one",
        SlotAllocator.renew,
        same_handles,
        [
            test_streams.test_handles_from_before_the_slots_stream_are_unknown_rather_than_fenced,
            test_slots.test_handles_change_with_each_release_and_each_renewal,
        ],
    ),
    BrokenRule(
        "a former owner is not fenced",
        SlotAllocator.renew,
        same_handles,
        [test_streams.test_handing_over_fences_former_handles_and_gives_new_ones],
    ),
    BrokenRule(
        "a parked stream belongs to its former owner's number",
        StreamTable.park,
        lambda original, table, slots, now_ns: None,
        [test_streams.test_a_parked_stream_is_nobodys_but_keeps_its_handle_and_epoch],
    ),
    BrokenRule(
        "two owners of a stream have the same epoch",
        StreamTable.hand_over,
        same_epoch,
        [test_streams.test_every_ownership_has_an_epoch_of_its_own_and_epochs_only_rise],
    ),
    BrokenRule(
        "the former epoch is good after a frame was sent under the present one",
        check_resume,
        as_if_no_frame_was_sent,
        [test_ownership.test_the_former_epoch_is_good_until_a_frame_was_sent_under_the_present_one],
    ),
    BrokenRule(
        "a delayed resume over an older connection fences the owner",
        check_resume,
        whichever_connection,
        [test_ownership.test_an_older_connection_that_names_the_former_epoch_is_late],
    ),
    BrokenRule(
        "outputs that are gone are promised",
        check_resume,
        never(Code.OUTPUTS_GONE),
        [test_ownership.test_outputs_beyond_the_frame_buffer_are_gone_though_they_were_not_acknowledged],
    ),
    BrokenRule(
        "the loss of outputs that a client has is not told",
        check_resume,
        never(Code.DATA_LOSS),
        [partial(test_ownership.test_outputs_that_the_server_does_not_know_of_are_data_loss, have=31)],
    ),
    BrokenRule(
        "a change during a flush is forgotten",
        DirtyTracker.flushed,
        lambda original, dirty, slots: dirty.mark_clean(slots),
        [test_dirty.test_a_flush_takes_what_has_changed_since_the_last_one],
    ),
)

table = test_ownership.table


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
