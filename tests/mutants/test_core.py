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
    pending = Tables(*packed).streams["pending"]
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


W = test_admission.W
RULES = (
    BrokenRule(
        "NaN is applied",
        replaces=admit,
        variant=finite,
        found_by=[partial(test_admission.test_a_bad_frame_stops_its_own_column_only, core=CoreStreams(W), bad=np.nan)],
    ),
    BrokenRule(
        "one bad frame fails the whole message",
        replaces=admit,
        variant=bad_for_all_columns,
        found_by=[partial(test_admission.test_a_bad_frame_stops_its_own_column_only, core=CoreStreams(W), bad=np.nan)],
    ),
    BrokenRule(
        "a frame behind a gap is applied",
        replaces=admit,
        variant=no_gaps,
        found_by=[partial(test_admission.test_a_seq_beyond_the_expected_one_is_a_gap, core=CoreStreams(W), seq=4)],
    ),
    BrokenRule(
        "other bytes under a seq that was applied are taken for a repeat",
        replaces=admit,
        variant=no_conflicts,
        found_by=[
            partial(
                test_admission.test_one_bit_that_differs_is_a_conflict_from_its_frame_on, core=CoreStreams(W), bit=31
            )
        ],
    ),
    BrokenRule(
        "the window is a frame longer",
        replaces=admit,
        variant=acknowledged_later,
        found_by=[
            partial(
                test_admission.test_the_window_moves_with_what_was_acknowledged_not_with_what_was_computed,
                core=CoreStreams(W),
            )
        ],
    ),
    BrokenRule(
        "an output that was not computed is acknowledged",
        replaces=admit,
        variant=acknowledged_as_far_as_computed,
        found_by=[
            partial(
                test_admission.test_an_output_that_was_not_computed_cannot_be_acknowledged, core=CoreStreams(W), acked=2
            )
        ],
    ),
    BrokenRule(
        "an acknowledgement is taken back",
        replaces=admit,
        variant=acknowledgement_taken_back,
        found_by=[partial(test_admission.test_an_acknowledgement_is_never_taken_back, core=CoreStreams(W))],
    ),
    BrokenRule(
        "a stream that is named twice is stepped",
        replaces=admit,
        variant=second_name_ignored,
        found_by=[
            partial(test_admission.test_a_stream_named_twice_is_found_before_anything_changes, core=CoreStreams(W))
        ],
    ),
    BrokenRule(
        "an origin steps the stream of another",
        replaces=admit,
        variant=whoever_owns_it,
        found_by=[partial(test_admission.test_a_foreign_streams_seq_is_neither_moved_nor_told, core=CoreStreams(W))],
    ),
    BrokenRule(
        "a fenced handle is still good",
        replaces=admit,
        variant=newest_handle,
        found_by=[
            partial(
                test_admission.test_a_fenced_handle_neither_steps_nor_acknowledges_nor_is_told_the_seq,
                core=CoreStreams(W),
            )
        ],
    ),
    BrokenRule(
        "an origin has no bound of unanswered frames",
        replaces=admit,
        variant=without_limit(CREDIT),
        found_by=[
            test_admission.test_an_origins_unanswered_frames_are_bounded_by_its_credit_and_others_are_not_concerned
        ],
    ),
    BrokenRule(
        "pending frames have no bound",
        replaces=admit,
        variant=without_limit(MAX_PENDING),
        found_by=[test_admission.test_a_message_that_exceeds_what_may_be_pending_is_refused_whole],
    ),
    BrokenRule(
        "a frame is answered twice while its answer is pending",
        replaces=admit,
        variant=nothing_pending,
        found_by=[
            partial(test_admission.test_a_frame_whose_answer_is_pending_is_not_answered_twice, core=CoreStreams(W))
        ],
    ),
    BrokenRule(
        "a held stream steps",
        replaces=begin_run,
        variant=nothing_held,
        found_by=[test_scheduler.test_a_held_stream_loses_its_turn_and_has_it_again_when_it_is_released],
    ),
    BrokenRule(
        "two frames of a stream are in runs at once",
        replaces=begin_run,
        variant=not_running,
        found_by=[test_scheduler.test_a_stream_in_a_run_is_in_no_other_batch],
    ),
    BrokenRule(
        "a batch is larger than it may be",
        replaces=begin_run,
        variant=lambda original, packed, max_batch_size, max_steps: original(packed, max_batch_size + 1, max_steps),
        found_by=[test_scheduler.test_streams_of_one_origin_step_first_in_first_out],
    ),
    BrokenRule(
        "a run has more steps than one of its streams has frames",
        replaces=begin_run,
        variant=lambda original, *arguments: (original(*arguments)[0], arguments[-1]),
        found_by=[test_scheduler.test_a_run_takes_several_frames_of_each_stream_as_far_as_all_of_them_have_frames],
    ),
    BrokenRule(
        "each batch begins with the same origin",
        replaces=begin_run,
        variant=same_turn_again,
        found_by=[test_scheduler.test_busy_origins_take_turns],
    ),
    BrokenRule(
        "a stream with more frames is forgotten after a run",
        replaces=finish_run,
        variant=not_ready_again,
        found_by=[partial(test_runs.test_frames_are_stepped_in_the_order_of_their_seqs, core=CoreStreams())],
    ),
    BrokenRule(
        "frames behind one that failed are said to have failed themselves",
        replaces=fail_run,
        variant=same_reason_for_all,
        found_by=[partial(test_runs.test_a_failed_step_fails_its_frame_and_everything_behind_it, core=CoreStreams())],
    ),
    BrokenRule(
        "the expected seq is not moved back after a failed step",
        replaces=fail_run,
        variant=expected_seq_not_moved_back,
        found_by=[partial(test_runs.test_a_failed_step_fails_its_frame_and_everything_behind_it, core=CoreStreams())],
    ),
    BrokenRule(
        "one release undoes all holds",
        replaces=release,
        variant=released_at_once,
        found_by=[test_scheduler.test_a_held_stream_loses_its_turn_and_has_it_again_when_it_is_released],
    ),
    BrokenRule(
        "a frame that was not applied has an output",
        replaces=assemble,
        variant=zeros_for_what_is_missing,
        found_by=[test_replies.test_columns_that_were_refused_are_nan_and_their_neighbours_are_not],
    ),
    BrokenRule(
        "replies are out of order",
        replaces=assemble,
        variant=newest_first,
        found_by=[test_replies.test_messages_of_one_origin_and_length_are_answered_together],
    ),
    BrokenRule(
        "a repeat is answered from a row that is used again",
        replaces=repeated_outputs,
        variant=nothing_kept,
        found_by=[
            partial(
                test_admission.test_repeated_outputs_are_those_of_admission_though_their_rows_are_used_again,
                core=CoreStreams(W),
            )
        ],
    ),
    BrokenRule(
        "the handle of a slot's former stream is good for the next one",
        replaces=SlotAllocator.renew,
        variant=same_handles,
        found_by=[
            test_streams.test_handles_from_before_the_slots_stream_are_unknown_rather_than_fenced,
            test_slots.test_handles_change_with_each_release_and_each_renewal,
        ],
    ),
    BrokenRule(
        "a former owner is not fenced",
        replaces=SlotAllocator.renew,
        variant=same_handles,
        found_by=[test_streams.test_handing_over_fences_former_handles_and_gives_new_ones],
    ),
    BrokenRule(
        "a parked stream belongs to its former owner's number",
        replaces=StreamTable.park,
        variant=lambda original, table, slots, now_ns: None,
        found_by=[test_streams.test_a_parked_stream_is_nobodys_but_keeps_its_handle_and_epoch],
    ),
    BrokenRule(
        "two owners of a stream have the same epoch",
        replaces=StreamTable.hand_over,
        variant=same_epoch,
        found_by=[test_streams.test_every_ownership_has_an_epoch_of_its_own_and_epochs_only_rise],
    ),
    BrokenRule(
        "the former epoch is good after a frame was sent under the present one",
        replaces=check_resume,
        variant=as_if_no_frame_was_sent,
        found_by=[test_ownership.test_the_former_epoch_is_good_until_a_frame_was_sent_under_the_present_one],
    ),
    BrokenRule(
        "a delayed resume over an older connection fences the owner",
        replaces=check_resume,
        variant=whichever_connection,
        found_by=[test_ownership.test_an_older_connection_that_names_the_former_epoch_is_late],
    ),
    BrokenRule(
        "outputs that are gone are promised",
        replaces=check_resume,
        variant=never(Code.OUTPUTS_GONE),
        found_by=[test_ownership.test_outputs_beyond_the_frame_buffer_are_gone_though_they_were_not_acknowledged],
    ),
    BrokenRule(
        "the loss of outputs that a client has is not told",
        replaces=check_resume,
        variant=never(Code.DATA_LOSS),
        found_by=[
            partial(test_ownership.test_outputs_that_the_server_does_not_know_of_are_data_loss, have=31),
        ],
    ),
    BrokenRule(
        "a change during a flush is forgotten",
        replaces=DirtyTracker.flushed,
        variant=lambda original, dirty, slots: dirty.mark_clean(slots),
        found_by=[test_dirty.test_a_flush_takes_what_has_changed_since_the_last_one],
    ),
)

table = test_ownership.table


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
