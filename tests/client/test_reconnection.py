"""How a connection is lost and made anew, step by step; what dice make of it is in test_never_lost."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import msgpack
import pytest

from instep_client.connection import Attempts, Call, State
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, FramesRefused, InvalidInput
from instep_client.protocol.wire import Kind
from instep_client.session import Session
from tests.support.fake_server import error, goodbye, reference
from tests.support.ring_link import RingLink, lose
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X


def is_lost(link: RingLink) -> bool:
    return link.session.state is State.RECONNECTING


class TestLoss:
    def test_silence_while_something_is_unanswered(self) -> None:
        link = RingLink()
        step = link.session.step(link.open("a"), X[0])
        link.advance()
        link.cut(noticed=False)
        link.advance(9.9)
        assert not is_lost(link)
        link.to_server[link.peer].clear()  # the probe
        link.advance(0.2)
        assert is_lost(link)
        assert link.finish(step).outputs.tolist() == reference(X[:1])[0][0].tolist()

    def test_a_server_that_was_restarted(self) -> None:
        link = RingLink()
        handle = link.open("a")
        lose(link)
        assert "was restarted" in link.session.attempts.why
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)
        assert link.session.info.boot_id == "boot 1"

    def test_a_connection_that_zeromq_made_anew(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.cut()
        link.to_client.append(error(0, Code.HELLO_FIRST))  # the answer to ZeroMQ's empty message
        link.deliver()
        assert is_lost(link)
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_a_connection_that_zeromq_made_for_the_first_time(self) -> None:
        session = Session("tcp://somewhere:1")
        session.receive(error(0, Code.HELLO_FIRST), 0.0)
        assert session.state is State.GREETING

    def test_a_greeting_that_was_lost_with_the_connection_it_was_sent_over(self) -> None:
        link = RingLink()
        handle = link.open("a")
        lose(link)
        link.advance(1.0)
        link.cut()  # HELLO with it
        link.serve()
        link.deliver()  # HELLO_FIRST: the first that this socket hears of any connection
        link.advance()
        link.serve()
        link.deliver()
        sockets, deadline = link.sockets, link.session.deadline()
        assert deadline is not None
        assert deadline <= link.now + 0.1  # the next attempt, and not the end of this one's patience
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)
        assert link.sockets == sockets + 1

    def test_a_first_greeting_that_was_lost_fails_at_once(self) -> None:
        session = Session("tcp://somewhere:1")
        assert [msgpack.unpackb(message[0])[0] for message in session.outbox.take_messages()] == [Kind.HELLO]
        session.receive(error(0, Code.HELLO_FIRST), 0.0)
        (ping,) = session.outbox.take_messages()
        kind, request = msgpack.unpackb(ping[0])
        assert kind == Kind.PING
        session.receive(error(request, Code.HELLO_FIRST), 0.0)
        with pytest.raises(ConnectionFailed, match="broke"):
            session.greeting.result()

    def test_goodbye(self) -> None:
        link = RingLink()
        step = link.session.step(link.open("a"), X[0])
        link.send(link.server.shut_down())
        link.deliver()
        link.server.restart()
        assert link.finish(step).outputs.shape == (2,)

    def test_frames_that_a_draining_server_refuses_wait_for_the_next_one(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.server.draining = True
        step = link.session.step(handle, X[0])
        for _ in range(3):
            link.advance(0.3)
            link.serve()
            link.deliver()
        assert not step.done
        link.server.restart()
        assert link.finish(step).outputs.shape == (2,)

    def test_frames_that_a_server_refuses_for_longer_are_refused(self) -> None:
        link = RingLink(reconnect_s=30.0)
        handle = link.open("a")
        link.server.draining = True
        began, step = link.now, link.session.step(handle, X[0])
        link.run(step)
        assert isinstance(step.error, FramesRefused)
        assert step.error.code is Code.SHUTTING_DOWN
        assert began + 30.0 <= link.now < began + 31.0
        link.server.draining = False
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_the_first_connection_is_not_tried_for(self) -> None:
        session = Session("tcp://somewhere:1", timeout_s=1.0)
        session.advance(0.0)
        session.advance(1.0)
        with pytest.raises(ConnectionFailed, match="nobody answers"):
            session.greeting.result()

    def test_a_silent_connection_with_streams_is_looked_after(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, park_s=60.0)))
        handle = link.open("a")
        link.cut()
        deadline = link.session.deadline()
        assert deadline is not None
        assert deadline <= link.now + 30.0
        link.now = deadline
        link.run()
        assert link.session.state is State.RECONNECTING
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_the_word_that_a_quiet_connection_asks_for_is_itself_waited_for(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, park_s=60.0)))
        link.open("a")
        for state in (State.OPEN, State.RECONNECTING):
            deadline = link.session.deadline()
            assert deadline is not None
            link.now = deadline
            link.advance()
            link.to_server[link.peer].clear()  # it gets lost, and nothing tells
            assert link.session.state is state

    def test_without_streams_silence_means_nothing(self) -> None:
        assert RingLink().session.deadline() is None


class TestAttempts:
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
        link = RingLink()
        handle = link.open("a")
        lose(link)
        while link.sockets == 0:
            link.advance(0.1)
        link.serve()  # what ZeroMQ sends first
        link.serve()
        while link.to_client:
            link.deliver()
        link.advance()
        deadline = link.session.deadline()
        assert deadline is not None
        assert deadline > link.now + 3.0
        for _ in range(3):
            link.advance(1.0)
        assert link.sockets == 1
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)

    def test_a_ping_that_was_lost_is_measured_anew(self) -> None:
        link = RingLink()
        ping = link.session.ping(link.now)
        link.advance()
        link.cut()
        sent_at = link.now
        assert link.finish(ping) == 0.0  # the clock stands while messages are on their way
        assert link.now > sent_at

    def test_each_attempt_is_another_socket_until_one_is_answered(self) -> None:
        link = RingLink()
        handle = link.open("a")
        lose(link)
        link.server.refused_hellos = 3
        assert link.finish(link.session.step(handle, X[0])).outputs.shape == (2,)
        assert link.sockets == 4

    def test_a_server_that_stays_away_is_given_up_in_time(self) -> None:
        link = RingLink(reconnect_s=30.0)
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
            with pytest.raises(
                ConnectionFailed,
                match="it was asked to; this client tried to connect again for 30 s and has given up: make another one",
            ):
                call.result()
        assert link.session.deadline() is None

    def test_a_server_that_breaks_whenever_it_was_reached_is_given_up_too(self) -> None:
        link = RingLink(reconnect_s=30.0)
        step = link.session.step(link.open("a"), X[0])
        while not step.done:
            link.advance()
            while link.to_server[link.peer]:
                if link.to_server[link.peer][0][0][:1] == bytes([Kind.STEP]):
                    link.cut()
                else:
                    link.serve()
            while link.to_client:
                link.deliver()
            link.now = max(link.now, link.session.deadline() or link.now)
        with pytest.raises(ConnectionFailed, match="tried to connect again"):
            step.result()

    @pytest.mark.parametrize("change", [{"fingerprint": "01"}, {"window_frames": 4}])
    def test_another_model_or_smaller_limits_are_no_server_to_go_on_with(self, change: dict[str, str]) -> None:
        link = RingLink()
        step = link.session.step(link.open("a"), X[0])
        link.server.info = replace(RING_INFO, **change)  # type: ignore[arg-type]
        lose(link)
        link.run(step)
        with pytest.raises(ConnectionFailed, match="was restarted with a"):
            step.result()

    def test_a_server_that_refuses_the_client_for_good(self) -> None:
        link = RingLink()
        link.open("a")
        lose(link)
        link.advance(2.0)
        hello = link.to_server[link.peer].pop()
        link.to_client.append(error(msgpack.unpackb(hello[0])[1], Code.WRONG_VERSION))
        link.deliver()
        with pytest.raises(ConnectionFailed, match="refused this client"):
            link.session.ping(0.0)

    def test_words_of_a_connection_that_was_given_up_are_not_heard(self) -> None:
        link = RingLink()
        lose(link)
        link.session.receive([b"\xff"], link.now)
        assert link.session.state is State.RECONNECTING

    def test_bad_times(self) -> None:
        with pytest.raises(InvalidInput, match="reconnect_s"):
            Session("tcp://somewhere:1", reconnect_s=-1.0)

    def test_leaving_without_a_connection_says_nothing(self) -> None:
        link = RingLink()
        handle = link.open("a")
        lose(link)
        assert link.session.leave() is None
        with pytest.raises(ClientClosed):
            link.session.step(handle, X[0])
