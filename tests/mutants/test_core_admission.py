"""The rules of admission, broken one by one: its tests notice each.

Compiled kernels are broken from outside, by what they are given or what they leave behind, so that every rule is broken
whether kernels are compiled or not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from instep.core.admission import admit
from instep.core.tables import CREDIT, MAX_PENDING, Packed, Tables, rows_of
from instep.core.typing import I64, U32
from tests.core import test_admission
from tests.support.broken_rules import BrokenRule, check_is_found
from tests.support.core_streams import CoreStreams

pytestmark = pytest.mark.long


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
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
