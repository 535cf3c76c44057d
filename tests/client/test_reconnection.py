"""How a connection is lost and made anew, step by step; what dice make of it is in test_never_lost."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from instep_client.connection import Attempts, Call, State
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ConnectionFailed
from tests.support.fake_server import RING_INFO, error, goodbye, reference
from tests.support.session_link import Link, X, lasting, lose
from tests.support.step_messages import parts


def is_lost(link: Link) -> bool:
    return link.session.state is State.RECONNECTING


class TestLoss:
    def test_silence_while_something_is_unanswered(self) -> None:
        link = lasting()
        step = link.session.step(link.open("a"), X[0])
        link.advance()
        link.cut(noticed=False)
        link.advance(9.9)
        assert not is_lost(link)
        link.to_server.clear()  # the probe
        link.advance(0.2)
        assert is_lost(link)
        assert link.finish(step).outputs.tolist() == reference(X[:1])[0][0].tolist()

    def test_a_server_that_was_restarted(self) -> None:
        link = lasting()
        handle = link.open("a")
        lose(link)
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)
        assert link.session.info.boot_id == "boot 1"

    def test_a_connection_that_zeromq_made_anew(self) -> None:
        link = lasting()
        handle = link.open("a")
        link.cut()
        link.to_client.append(error(0, Code.HELLO_FIRST))  # the answer to ZeroMQ's empty message
        link.deliver()
        assert is_lost(link)
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_a_greeting_that_was_lost_with_the_connection_it_was_sent_over(self) -> None:
        link = lasting()
        handle = link.open("a")
        lose(link)
        link.advance(1.0)
        link.cut()  # HELLO with it
        link.serve(1)
        link.deliver()  # HELLO_FIRST: the first that this socket hears of any connection
        link.advance()
        link.serve(1)
        link.deliver()
        sockets, deadline = link.sockets, link.session.deadline()
        assert deadline is not None
        assert deadline <= link.now + 0.1  # the next attempt, and not the end of this one's patience
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)
        assert link.sockets == sockets + 1

    def test_frames_that_a_draining_server_refuses_wait_for_the_next_one(self) -> None:
        link = lasting()
        handle = link.open("a")
        link.rules.draining = True
        step = link.session.step(handle, X[0])
        for _ in range(3):
            link.advance(0.3)
            link.serve(1)
            link.deliver()
        assert not step.done
        link.rules.restart()
        assert link.finish(step).outputs.shape == (2,)

    def test_a_silent_connection_with_streams_is_looked_after(self) -> None:
        link = lasting(replace(RING_INFO, park_s=60.0))
        handle = link.open("a")
        link.cut()
        deadline = link.session.deadline()
        assert deadline is not None
        assert deadline <= link.now + 30.0
        link.now = deadline
        link.run()
        assert link.session.state is State.RECONNECTING
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)


class TestAttempts:
    def test_a_server_that_is_away_for_hours_is_still_tried(self) -> None:
        recovery = Attempts(math.inf, 1.0, Random(1))
        assert all(recovery.lost(float(second), "gone") for second in range(5000))

    @pytest.mark.parametrize("reconnect_s", [1000.0, math.inf])
    def test_delays_double_up_to_two_seconds_and_are_drawn(self, reconnect_s: float) -> None:
        recovery = Attempts(reconnect_s, 1.0, Random(1))
        now, delays = 0.0, []
        for _ in range(9):
            assert recovery.lost(now, "gone")
            deadline = recovery.deadline()
            delays.append(deadline - now)
            assert recovery.is_due(deadline)
            recovery.begin(deadline)
            now = deadline + 1.0
            assert recovery.is_due(now)
        bounds = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
        assert all(bound / 2 <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
        assert len({delay / bound for delay, bound in zip(delays, bounds, strict=True)}) == 9

    def test_an_attempt_that_was_welcomed_waits_for_its_streams(self) -> None:
        link = lasting()
        handle = link.open("a")
        lose(link)
        while link.sockets == 0:
            link.advance(0.1)
        link.serve(1)  # what ZeroMQ sends first
        link.serve(1)
        link.settle_client()
        link.advance()
        deadline = link.session.deadline()
        assert deadline is not None
        assert deadline > link.now + 3.0
        for _ in range(3):
            link.advance(1.0)
        assert link.sockets == 1
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_a_server_that_stays_away_is_given_up_in_time(self) -> None:
        link = lasting(reconnect_s=30.0)
        handle = link.open("a")
        step = link.session.step(handle, X[0], keep=True)
        link.advance()
        link.send([(link.peer, goodbye())])
        link.deliver()
        began = link.now
        waiting: list[Call[Any]] = [
            link.session.ping(link.now),
            link.session.open(["b"], None, True),
            link.session.close(handle),
        ]
        while link.session.state is State.RECONNECTING:
            deadline = link.session.deadline()
            assert deadline is not None
            link.now = deadline
            link.advance()
        assert link.now == began + 30.0
        assert link.sockets > 5
        for call in (step, *waiting):
            with pytest.raises(ConnectionFailed):
                call.result()
        assert link.session.deadline() is None

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"fingerprint": "01"}, f"{RING_INFO.model}@{RING_INFO.fingerprint[:8]}"),
            ({"fingerprint": "01", "model": "other"}, "'other'"),
            ({"window_frames": 4}, "window_frames"),
        ],
    )
    def test_another_model_or_smaller_limits_are_no_server_to_go_on_with(
        self, change: dict[str, str], named: str
    ) -> None:
        link = lasting()
        step = link.session.step(link.open("a"), X[0])
        link.rules.info = replace(RING_INFO, **change)  # type: ignore[arg-type]
        lose(link)
        link.run(step)
        with pytest.raises(ConnectionFailed, match=named):
            step.result()

    def test_a_server_that_refuses_the_client_for_good(self) -> None:
        link = lasting()
        link.open("a")
        lose(link)
        link.advance(2.0)
        hello = link.to_server.pop()
        link.to_client.append(error(parts(hello)[0][1], Code.WRONG_VERSION))
        link.deliver()
        with pytest.raises(ConnectionFailed):
            link.session.ping(0.0)
