from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ConnectionFailed, FrameFailure, FramesRefused, Refused
from instep_tools.load.generator import Load, PartResult
from instep_tools.load.plan import LoadPart, LoadPlan
from instep_tools.pacing import Stop
from tests.tools.helpers import JumpingClock, ModelServer

PLAN = LoadPlan(streams=2, connections=1, processes=1, rate_hz=10.0, duration_s=1.0, warmup_s=0.0)


RATES = (10.0, None)
"""Of an open and a closed loop."""


async def run(
    behave: Callable[[int], float],
    connections: tuple[tuple[int, ...], ...] = ((2,),),
    stop: Stop | None = None,
    drain_s: float = 0.0,
    is_connected: bool = True,
    **changes: Any,
) -> tuple[PartResult, ModelServer]:
    clock = JumpingClock()
    server = ModelServer(clock, behave)
    server.is_connected = is_connected

    async def ready() -> float:
        return clock.time + 0.5

    plan = replace(PLAN, streams=sum(map(sum, connections)), **changes)
    load = Load(LoadPart("load", connections, plan), cast(Any, server.connect), clock, stop or Stop())
    result = await load.run(ready, drain_s)
    assert server.open_connections == 0
    return result, server


async def test_an_open_loop_sends_when_due_and_counts_from_then() -> None:
    result, server = await run(lambda number: 0.004)
    (group,), samples = server.groups, result.samples
    np.testing.assert_allclose(group.sent_at, 1000.5 + 0.1 * np.arange(10))
    assert group.shapes == [(1, 2, 3)] * 10
    np.testing.assert_allclose(samples["latency_us"], 4000, rtol=1e-6)
    np.testing.assert_allclose(samples["at_s"], 0.004 + 0.1 * np.arange(10), rtol=1e-6)
    np.testing.assert_allclose(samples["late_us"], 0, atol=1e-3)
    assert samples["frames"].tolist() == [2] * 10
    assert [samples[name].tolist()[0] for name in ("queue_us", "compute_us", "send_us")] == [10, 20, 30]
    assert (result.unanswered, result.refused, result.stopped) == (0, {}, False)


async def test_a_slow_answer_cannot_hide_the_frames_that_queue_behind_it() -> None:
    """The third block takes 0.35 s, in which the loop cannot send: those that were due then are late, and it shows."""
    result, _ = await run(lambda number: 0.35 if number == 2 else 0.0)
    for column, first in (("latency_us", 0.35), ("late_us", 0.0)):
        expected = [0, 0, first, 0.25, 0.15, 0.05, 0, 0, 0, 0]
        np.testing.assert_allclose(result.samples[column] / 1e6, expected, atol=1e-6)


async def test_groups_of_all_connections_take_turns() -> None:
    _, server = await run(lambda number: 0.0, ((1, 2), (3,)))
    assert server.connections == 2
    first = {len(group.names): group.sent_at[0] - 1000.5 for group in server.groups}
    assert first == pytest.approx({1: 0, 3: 0.1 / 3, 2: 0.2 / 3})
    assert all(len(group.sent_at) == 10 for group in server.groups)
    assert len({name for group in server.groups for name in group.names}) == 6


async def test_the_warm_up_does_not_count() -> None:
    result, server = await run(lambda number: 0.09 if number < 5 else 0.001, warmup_s=0.5)
    assert (len(server.groups[0].sent_at), len(result.samples)) == (15, 10)
    np.testing.assert_allclose(result.samples["latency_us"], 1000, rtol=1e-6)
    assert result.samples["at_s"].min() >= 0


async def test_a_closed_loop_sends_when_answered() -> None:
    result, server = await run(lambda number: 0.03, rate_hz=None, warmup_s=0.3)
    np.testing.assert_allclose(np.diff(server.groups[0].sent_at), 0.03)
    np.testing.assert_allclose(result.samples["latency_us"], 30_000, rtol=1e-6)
    assert len(server.groups[0].sent_at) == math.ceil(1.3 / 0.03)


@pytest.mark.parametrize("rate_hz", RATES)
async def test_a_stop_ends_both_loops_and_closes(rate_hz: float | None) -> None:
    stop = Stop()

    def behave(number: int) -> float:
        if number == 3:
            stop.request()
        return 0.02

    result, _ = await run(behave, stop=stop, rate_hz=rate_hz)
    assert (result.stopped, len(result.samples)) == (True, 4)


async def test_what_is_never_answered_counts_with_the_time_it_waited() -> None:
    result, _ = await run(lambda number: math.inf if number >= 8 else 0.0)
    assert (result.unanswered, result.lost) == (4, "")
    assert np.isnan(result.samples["compute_us"]).tolist() == [False] * 8 + [True] * 2
    np.testing.assert_allclose(np.sort(result.samples["latency_us"][8:]), [0, 100_000], atol=1e-3)
    result, _ = await run(lambda number: math.inf if number >= 6 else 0.0, is_connected=False)
    assert (result.unanswered, bool(result.lost)) == (8, True)


def refuse_some(number: int) -> float:
    if number == 1:
        raise Refused(Code.BUSY, Code.BUSY.sentence)
    if number == 2:
        outputs = np.zeros((1, 2, 2), np.float32)
        outputs[0, 1] = np.nan
        failure = FrameFailure("b", 2, Code.STEP_FAILED, 2)
        raise FramesRefused(Code.STEP_FAILED, Code.STEP_FAILED.sentence, (failure,), outputs)
    return 0.0


async def test_refused_frames_are_counted_by_code() -> None:
    for warmup_s, refused, samples in ((0.0, {"BUSY": 2, "STEP_FAILED": 1}, 8), (0.5, {}, 10)):
        result, _ = await run(refuse_some, warmup_s=warmup_s)
        assert (result.refused, len(result.samples)) == (refused, samples)


def lose_one_of_a_block(number: int) -> float:
    if number == 4:
        failures = (FrameFailure("a", 4, Code.SEQ_GAP, 0), FrameFailure("b", 4, Code.STATE_LOST, 0))
        raise FramesRefused(Code.SEQ_GAP, Code.SEQ_GAP.sentence, failures, np.zeros((1, 2, 2), np.float32))
    return 0.01


@pytest.mark.parametrize("rate_hz", RATES)
async def test_a_stream_that_has_ended_at_the_server_ends_the_test(rate_hz: float | None) -> None:
    result, _ = await run(lose_one_of_a_block, rate_hz=rate_hz)
    assert "SEQ_GAP" in result.lost
    assert len(result.samples) == 4, "what was measured before is not lost"


def lose_the_server(number: int) -> float:
    if number == 4:
        raise ConnectionFailed("gone")
    return 0.01


@pytest.mark.parametrize("rate_hz", RATES)
async def test_a_connection_that_is_lost_for_good_ends_the_test(rate_hz: float | None) -> None:
    result, _ = await run(lose_the_server, ((1, 1), (1,)), rate_hz=rate_hz)
    assert (result.lost, len(result.samples) >= 4) == ("gone", True)
    result, _ = await run(lambda number: lose_the_server(4), rate_hz=rate_hz)
    assert (result.lost, len(result.samples), result.unanswered) == ("gone", 1, 2)
    assert np.isnan(result.samples["rest_us"]).all(), "nothing was answered"


async def test_what_this_side_is_too_late_to_send_is_not_sent() -> None:
    """Blocks 2 and 3 hold the loop up until 1.3 s, when it is too late for the other six."""
    result, server = await run(lambda number: {2: 0.9, 3: 0.3}.get(number, 0.0))
    assert (len(server.groups[0].sent_at), result.unsent, result.unanswered) == (4, 12, 0)
    np.testing.assert_allclose(result.samples["late_us"] / 1e6, [0, 0, 0, 0.8], atol=1e-6)


async def test_a_closed_loop_ends_though_answers_do_not_come() -> None:
    behave = lambda number: math.inf if number == 3 else 0.3  # noqa: E731
    result, _ = await run(behave, rate_hz=None, drain_s=0.01, duration_s=1.2)
    assert (len(result.samples), result.unanswered) == (4, 2)
