"""The rules of streams and their owners, broken one by one: their tests notice each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from instep.core.dirty import DirtyTracker
from instep.core.ownership import ResumeDecision, check_resume
from instep.core.slots import SlotAllocator
from instep.core.streams import StreamTable
from instep.core.typing import I64
from instep_client.protocol.codes import Code
from tests.core import test_dirty, test_ownership, test_slots, test_streams
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


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


RULES = (
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
