"""The client's rules, broken one by one: its tests notice each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from instep_client.connection import Outbox
from instep_client.frames import SendQueue
from instep_client.protocol.wire import ServerInfo
from instep_client.requests import Claim, StreamsRequest
from instep_client.streams import OpenStreams
from tests.client import (
    test_busy,
    test_exactly_once,
    test_flow,
    test_hibernation,
    test_resuming,
    test_rewind,
    test_session,
    test_window,
)
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


def new_frames_are_sent(original: Any, queue: SendQueue, now: float) -> bool:
    original(queue, now)
    return True


def without_credit(original: Any, queue: SendQueue, info: ServerInfo) -> None:
    original(queue, replace(info, credit_frames=2**30))


def nothing_is_lost(original: Any, table: OpenStreams, row: int) -> int:
    return 0


def first_portion_alone(original: Any, claim: Claim) -> None:
    original(claim)
    claim._left = claim._left[:0]


def with_busy_alone() -> None:
    """`test_with_busy_alone_every_frame_is_applied_in_order_once`, but without the search for the simplest example."""
    for seed in range(20):
        test_exactly_once.run_with_busy_alone(seed, credit_frames=8, busy=0.6, window=5)


RULES = (
    BrokenRule(
        "frames in flight are forgotten with the connection",
        replaces=SendQueue.lost,
        variant=lambda original, queue: queue.on_the_way.clear(),
        found_by=[test_resuming.TestFrames().test_what_was_applied_is_answered_again_and_the_rest_is_applied],
    ),
    BrokenRule(
        "a frame that was refused as BUSY fails at once",
        replaces=SendQueue._passes,
        variant=lambda original, queue, code, now: False,
        found_by=[test_busy.test_everything_waits_then_refused_frames_go_first_in_their_order],
    ),
    BrokenRule(
        "new frames overtake those that were refused as BUSY",
        replaces=SendQueue._is_free,
        variant=new_frames_are_sent,
        found_by=[test_busy.test_everything_waits_then_refused_frames_go_first_in_their_order],
    ),
    BrokenRule(
        "more frames are in flight than the server's credit allows",
        replaces=SendQueue.limit,
        variant=without_credit,
        found_by=[test_flow.test_nothing_is_sent_beyond_the_credit_and_stream_handles_take_turns],
    ),
    BrokenRule(
        "a stream runs ahead of its window",
        replaces=OpenStreams.in_window,
        variant=lambda original, table, rows, timesteps, window: True,
        found_by=[test_window.test_chunks_are_cut_to_half_a_window_and_wait_for_outputs_beyond_it],
    ),
    BrokenRule(
        "a frame that waits behind a refused one is acknowledged",
        replaces=SendQueue._acknowledge,
        variant=lambda original, queue, block, failures: original(queue, block, []),
        found_by=[with_busy_alone],
    ),
    BrokenRule(
        "an output is acknowledged before those in front of it have arrived",
        replaces=OpenStreams.came,
        variant=lambda original, table, rows, first, end: original(table, rows, np.zeros_like(first), end),
        found_by=[test_window.test_outputs_that_come_out_of_order_count_when_the_earlier_ones_have_come],
    ),
    BrokenRule(
        "the seqs of a stream run on behind a refused frame",
        replaces=OpenStreams.rewind,
        variant=lambda original, table, row, expected, outputs_are_gone: None,
        found_by=[test_rewind.test_what_was_sent_before_says_nothing_of_what_was_sent_after],
    ),
    BrokenRule(
        "a stream is used under the handle of a lost connection",
        replaces=OpenStreams.resumed,
        variant=lambda original, table, rows, grants: None,
        found_by=[test_resuming.TestFrames().test_what_was_applied_is_answered_again_and_the_rest_is_applied],
    ),
    BrokenRule(
        "frames that the server lost are passed over in silence",
        replaces=OpenStreams.given,
        variant=nothing_is_lost,
        found_by=[
            test_resuming.TestPersonsDecide().test_a_server_that_lost_a_frame_behind_one_whose_output_did_not_come
        ],
    ),
    BrokenRule(
        "a stream that hibernates is taken for one that has ended",
        replaces=OpenStreams.sleep,
        variant=lambda original, table, rows, asleep=True: None,
        found_by=[test_hibernation.test_frames_of_a_stream_wait_in_order_while_others_go_on],
    ),
    BrokenRule(
        "a request that crossed the word of a new handle is refused",
        replaces=StreamsRequest._is_renewed,
        variant=lambda original, request, refused: False,
        found_by=[
            test_hibernation.test_a_request_is_repeated_for_streams_that_woke_under_new_handles_before_it_arrived
        ],
    ),
    BrokenRule(
        "a claim ends with its first portion",
        replaces=Claim.ask,
        variant=first_portion_alone,
        found_by=[test_hibernation.test_streams_are_claimed_in_portions_that_find_room_though_they_sleep],
    ),
    BrokenRule(
        "what is granted while the client leaves stays open",
        replaces=Outbox.under_way,
        variant=lambda original, outbox, reply: {},
        found_by=[partial(test_session.test_leaving_closes_what_is_about_to_be_opened, False)],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
