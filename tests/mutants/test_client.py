"""The client's rules, broken one by one: its tests notice each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from instep_client.flow import Flow
from instep_client.in_flight import InFlight
from instep_client.pending import Pending
from instep_client.protocol.wire import ServerInfo
from instep_client.requests import ReadStateCall
from instep_client.sleepers import Sleepers
from instep_client.streams import OpenStreams
from tests.client import (
    test_busy,
    test_exactly_once,
    test_flow,
    test_resuming,
    test_rewind,
    test_session,
    test_sleepers,
    test_window,
)
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


def new_frames_are_sent(original: Any, in_flight: InFlight, now: float) -> bool:
    original(in_flight, now)
    return True


def without_credit(original: Any, flow: Flow, info: ServerInfo) -> None:
    original(flow, replace(info, credit_frames=2**30))


def nothing_is_lost(original: Any, sleepers: Sleepers, rows: Any, grants: Any, *rest: Any) -> Any:
    granted = grants.copy()
    granted["next_seq"] = 2**62
    return original(sleepers, rows, granted, *rest)


def whoever_resumes(original: Any, sleepers: Sleepers, now: float) -> Any:
    sleepers.resuming.clear()
    return original(sleepers, now)


def with_busy_alone() -> None:
    """`test_with_busy_alone_every_frame_is_applied_in_order_once`, but without the search for the simplest example."""
    for seed in range(20):
        test_exactly_once.run_with_busy_alone(seed, credit_frames=8, busy=0.6, window=5)


RULES = (
    BrokenRule(
        "frames in flight are forgotten with the connection",
        replaces=InFlight.blocks,
        variant=lambda original, in_flight: [],
        found_by=[test_resuming.TestFrames().test_what_was_applied_is_answered_again_and_the_rest_is_applied],
    ),
    BrokenRule(
        "a frame that was refused as BUSY fails at once",
        replaces=InFlight._passes,
        variant=lambda original, in_flight, code, now: False,
        found_by=[test_busy.test_everything_waits_then_refused_frames_go_first_in_their_order],
    ),
    BrokenRule(
        "new frames overtake those that were refused as BUSY",
        replaces=InFlight.is_free,
        variant=new_frames_are_sent,
        found_by=[test_busy.test_everything_waits_then_refused_frames_go_first_in_their_order],
    ),
    BrokenRule(
        "more frames are in flight than the server's credit allows",
        replaces=Flow.limit,
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
        replaces=InFlight._acknowledge,
        variant=lambda original, in_flight, block, failures: original(in_flight, block, []),
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
        replaces=Sleepers.granted,
        variant=nothing_is_lost,
        found_by=[
            test_resuming.TestPersonsDecide().test_a_server_that_lost_a_frame_behind_one_whose_output_did_not_come
        ],
    ),
    BrokenRule(
        "frames go to a stream that hibernates",
        replaces=Flow._wakes,
        variant=lambda original, flow, queue, rows: False,
        found_by=[test_sleepers.test_the_next_frame_wakes_its_stream_and_no_other],
    ),
    BrokenRule(
        "a request that crossed the word of a stream's sleep is refused",
        replaces=ReadStateCall._only_sleeps,
        variant=lambda original, request, refused: False,
        found_by=[partial(test_sleepers.test_a_read_that_crossed_the_word_is_repeated_by_name, False)],
    ),
    BrokenRule(
        "the client claims a stream that its user has asked to resume",
        replaces=Sleepers.due,
        variant=whoever_resumes,
        found_by=[
            test_sleepers.test_a_stream_that_is_resumed_while_its_sleeper_is_waited_for_belongs_to_who_resumed_it
        ],
    ),
    BrokenRule(
        "what is granted while the client leaves stays open",
        replaces=Pending.under_way,
        variant=lambda original, pending, reply: {},
        found_by=[partial(test_session.test_leaving_closes_what_is_about_to_be_opened, False)],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
