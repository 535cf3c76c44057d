from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import ConnectionFailed, FrameFailure, FramesRefused, Refused, StreamEvicted
from instep_tools.load.generator import Load, PartResult
from instep_tools.load.plan import LoadPart, LoadPlan
from instep_tools.pacing import Stop
from tests.tools.helpers import JumpingClock, ModelServer

PLAN = LoadPlan(streams=2, connections=1, processes=1, rate_hz=10.0, duration_s=1.0, warmup_s=0.0)


RATES = (10.0, None)
"""Of an open and a closed loop."""


async def run(
    server: ModelServer,
    clock: JumpingClock,
    connections: tuple[tuple[int, ...], ...] = ((2,),),
    stop: Stop | None = None,
    drain_s: float = 0.0,
    **changes: Any,
) -> PartResult:
    async def ready() -> float:
        return clock.time + 0.5

    plan = replace(PLAN, streams=sum(map(sum, connections)), **changes)
    load = Load(LoadPart("load", connections, plan), cast(Any, server.connect), clock, stop or Stop())
    return await load.run(ready, drain_s)


async def test_an_open_loop_sends_when_due_and_counts_from_then() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: 0.004)
    result = await run(server, clock)
    assert len(server.groups) == 1
    np.testing.assert_allclose(server.groups[0].sent_at, 1000.5 + 0.1 * np.arange(10))
    assert server.groups[0].shapes == [(1, 2, 3)] * 10
    samples = result.samples
    np.testing.assert_allclose(samples["latency_us"], 4000, rtol=1e-6)
    np.testing.assert_allclose(samples["at_s"], 0.004 + 0.1 * np.arange(10), rtol=1e-6)
    np.testing.assert_allclose(samples["late_us"], 0, atol=1e-3)
    assert samples["frames"].tolist() == [2] * 10
    assert [samples[name].tolist()[0] for name in ("queue_us", "compute_us", "send_us")] == [10, 20, 30]
    assert (result.unanswered, result.refused, result.stopped) == (0, {}, False)
    assert server.open_connections == 0


async def test_a_slow_answer_cannot_hide_the_frames_that_queue_behind_it() -> None:
    """The third block takes 0.35 s, in which the loop cannot send: those that were due then are late, and it shows."""
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: 0.35 if number == 2 else 0.0)
    result = await run(server, clock)
    expected = np.zeros(10)
    expected[2:6] = [0.35, 0.25, 0.15, 0.05]
    np.testing.assert_allclose(result.samples["latency_us"] / 1e6, expected, atol=1e-6)
    late = expected.copy()
    late[2] = 0
    np.testing.assert_allclose(result.samples["late_us"] / 1e6, late, atol=1e-6)


async def test_groups_of_all_connections_take_turns() -> None:
    clock = JumpingClock()
    server = ModelServer(clock)
    await run(server, clock, ((1, 2), (3,)))
    assert server.connections == 2
    assert [len(group.names) for group in server.groups] == [1, 2, 3]
    first = {len(group.names): group.sent_at[0] - 1000.5 for group in server.groups}
    assert first == pytest.approx({1: 0, 3: 0.1 / 3, 2: 0.2 / 3})
    assert all(len(group.sent_at) == 10 for group in server.groups)
    names = [name for group in server.groups for name in group.names]
    assert len(set(names)) == 6


async def test_the_warm_up_does_not_count() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: 0.09 if number < 5 else 0.001)
    result = await run(server, clock, warmup_s=0.5)
    assert len(server.groups[0].sent_at) == 15
    assert len(result.samples) == 10
    np.testing.assert_allclose(result.samples["latency_us"], 1000, rtol=1e-6)
    assert result.samples["at_s"].min() >= 0


async def test_a_closed_loop_sends_when_answered() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: 0.03)
    result = await run(server, clock, rate_hz=None, warmup_s=0.3)
    np.testing.assert_allclose(np.diff(server.groups[0].sent_at), 0.03)
    np.testing.assert_allclose(result.samples["latency_us"], 30_000, rtol=1e-6)
    assert len(server.groups[0].sent_at) == math.ceil(1.3 / 0.03)


async def test_a_stop_ends_both_loops_and_closes() -> None:
    for rate_hz in RATES:
        clock, stop = JumpingClock(), Stop()

        def behave(number: int, stop: Stop = stop) -> float:
            if number == 3:
                stop.request()
            return 0.02

        server = ModelServer(clock, behave)
        result = await run(server, clock, stop=stop, rate_hz=rate_hz)
        assert result.stopped
        assert len(result.samples) == 4


async def test_what_is_never_answered_counts_with_the_time_it_waited() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: math.inf if number >= 8 else 0.0)
    result = await run(server, clock)
    assert (result.unanswered, result.lost) == (4, "")
    assert np.isnan(result.samples["compute_us"]).tolist() == [False] * 8 + [True] * 2
    np.testing.assert_allclose(np.sort(result.samples["latency_us"][8:]), [0, 100_000], atol=1e-3)
    assert server.open_connections == 0
    server = ModelServer(clock, lambda number: math.inf if number >= 6 else 0.0)
    server.is_connected = False
    result = await run(server, clock)
    assert (result.unanswered, bool(result.lost)) == (8, True)


async def test_what_was_due_in_the_warm_up_is_not_missed() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: math.inf if number < 2 else 0.0)
    result = await run(server, clock, warmup_s=0.5)
    assert (result.unanswered, len(result.samples)) == (0, 10)


def refuse_some(number: int) -> float:
    if number == 1:
        raise Refused(Code.BUSY, SENTENCES[Code.BUSY])
    if number == 2:
        outputs = np.zeros((1, 2, 2), np.float32)
        outputs[0, 1] = np.nan
        failure = FrameFailure("b", 2, Code.STEP_FAILED, 2)
        raise FramesRefused(Code.STEP_FAILED, SENTENCES[Code.STEP_FAILED], (failure,), outputs)
    return 0.0


@pytest.mark.parametrize(("warmup_s", "refused"), [(0.0, {"BUSY": 2, "STEP_FAILED": 1}), (0.5, {})])
async def test_refused_frames_are_counted_by_code(warmup_s: float, refused: dict[str, int]) -> None:
    clock = JumpingClock()
    result = await run(ModelServer(clock, refuse_some), clock, warmup_s=warmup_s)
    assert result.refused == refused
    assert len(result.samples) == (8 if refused else 10)


def lose_the_stream(number: int) -> float:
    if number == 4:
        raise StreamEvicted(Code.UNKNOWN_STREAM, SENTENCES[Code.UNKNOWN_STREAM], "b")
    return 0.01


def lose_one_of_a_block(number: int) -> float:
    if number == 4:
        failures = (FrameFailure("a", 4, Code.SEQ_GAP, 0), FrameFailure("b", 4, Code.STATE_LOST, 0))
        raise FramesRefused(Code.SEQ_GAP, SENTENCES[Code.SEQ_GAP], failures, np.zeros((1, 2, 2), np.float32))
    return 0.01


@pytest.mark.parametrize("lose", [lose_the_stream, lose_one_of_a_block])
@pytest.mark.parametrize("rate_hz", RATES)
async def test_a_stream_that_has_ended_at_the_server_ends_the_test(
    rate_hz: float | None, lose: Callable[[int], float]
) -> None:
    clock = JumpingClock()
    result = await run(ModelServer(clock, lose), clock, rate_hz=rate_hz)
    assert "UNKNOWN_STREAM" in result.lost or "SEQ_GAP" in result.lost
    assert len(result.samples) == 4, "what was measured before is not lost"


def lose_the_server(number: int) -> float:
    if number == 4:
        raise ConnectionFailed("the server went away")
    return 0.01


@pytest.mark.parametrize("rate_hz", RATES)
async def test_a_connection_that_is_lost_for_good_ends_the_test(rate_hz: float | None) -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lose_the_server)
    result = await run(server, clock, ((1, 1), (1,)), rate_hz=rate_hz)
    assert result.lost == "the server went away"
    assert len(result.samples) >= 4
    assert server.open_connections == 0
    result = await run(ModelServer(clock, lambda number: lose_the_server(4)), clock, rate_hz=rate_hz)
    assert (result.lost, len(result.samples), result.unanswered) == ("the server went away", 1, 2)
    assert np.isnan(result.samples["rest_us"]).all(), "nothing was answered"


async def test_what_was_on_its_way_when_the_connection_was_lost_for_good_is_unanswered() -> None:
    """Blocks 2 and 3 wait until block 4, sent at 0.4 s, finds the connection lost; time is 0.5 s then."""
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: math.inf if number in (2, 3) else lose_the_server(number))
    result = await run(server, clock)
    assert (result.lost, result.unanswered) == ("the server went away", 6)
    np.testing.assert_allclose(np.sort(result.samples["latency_us"][2:]), [100_000, 200_000, 300_000], atol=1e-3)


async def test_what_this_side_is_too_late_to_send_is_not_sent() -> None:
    """Blocks 2 and 3 hold the loop up until 1.3 s, when it is too late for the other six."""
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: {2: 0.9, 3: 0.3}.get(number, 0.0))
    result = await run(server, clock)
    assert len(server.groups[0].sent_at) == 4
    assert (result.unsent, result.unanswered) == (12, 0)
    np.testing.assert_allclose(result.samples["late_us"] / 1e6, [0, 0, 0, 0.8], atol=1e-6)


async def test_what_this_side_is_too_late_to_send_in_the_warm_up_is_left_out() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: 0.55 if number == 1 else 0.0)
    result = await run(server, clock, warmup_s=0.5)
    assert len(server.groups[0].sent_at) == 3 + 10, "the third was on its way"
    assert (len(result.samples), result.unsent) == (10, 0)


async def test_a_closed_loop_ends_though_answers_do_not_come() -> None:
    clock = JumpingClock()
    server = ModelServer(clock, lambda number: math.inf if number == 3 else 0.3)
    result = await run(server, clock, rate_hz=None, drain_s=0.01, duration_s=1.2)
    assert (len(result.samples), result.unanswered) == (4, 2)
