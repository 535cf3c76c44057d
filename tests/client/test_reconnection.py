"""How a connection is lost and made anew, step by step; what dice make of it is in test_never_lost."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest

from instep_client.calls import Call
from instep_client.liveness import Attempts, State
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    DataLoss,
    FramesRefused,
    InstepError,
    InvalidInput,
    NumericsChanged,
    StreamEvicted,
    StreamRefused,
)
from instep_client.protocol.wire import Kind, SwapPolicy
from instep_client.session import Session
from tests.support.fake_server import error, goodbye, reference
from tests.support.ring_link import RingLink
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X
from tests.support.states import floats_of


def lose(link: RingLink) -> None:
    """The server is restarted and says so at the next word."""
    link.server.restart()
    link.session.ping(link.now)
    link.advance()
    link.serve()
    link.deliver()
    assert link.session.state is State.RECONNECTING


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
        assert [msgpack.unpackb(message[0])[0] for message in session.pending.take_messages()] == [Kind.HELLO]
        session.receive(error(0, Code.HELLO_FIRST), 0.0)
        (ping,) = session.pending.take_messages()
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


class TestFrames:
    def test_what_was_applied_is_answered_again_and_the_rest_is_applied(self) -> None:
        link = RingLink()
        handle = link.open("a")
        steps = [link.session.step(handle, x) for x in X[:4]]
        link.advance()
        link.serve()
        link.serve()
        link.deliver()
        link.cut()
        for step, outputs in zip(steps, reference(X[:4])[0], strict=True):
            assert link.finish(step).outputs.tolist() == outputs.tolist()
        assert len(link.server.streams["a"].applied) == 4
        assert link.server.failures == []

    def test_streams_are_claimed_in_parts_that_fit(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, max_message_bytes=2 * 201)))
        group = link.open("a", "b", "c", "d", "e")
        lose(link)
        link.finish(link.session.step(group, np.ones((5, 3))))
        assert link.server.kinds.count(Kind.RESUME) == 3

    def test_a_connection_lost_while_claiming(self) -> None:
        link = RingLink()
        handle = link.open("a")
        step = link.session.step(handle, X[0])
        lose(link)
        kinds = link.server.kinds
        for claims in range(3):
            while kinds.count(Kind.RESUME) == claims:
                deadline = link.session.deadline()
                assert deadline is not None
                link.now = deadline
                link.advance()
                while link.to_server[link.peer] and kinds.count(Kind.RESUME) == claims:
                    while link.to_client:
                        link.deliver()
                    link.advance()
                    link.serve()
            link.cut()
            link.advance(10.0)
        assert link.finish(step).outputs.shape == (2,)

    def test_a_refused_frame_stays_refused(self) -> None:
        link = RingLink()
        handle = link.open("a")
        bad, behind = link.session.step(handle, [np.nan] * 3), link.session.step(handle, X[0])
        link.advance()
        link.serve()
        link.deliver()
        assert isinstance(bad.error, FramesRefused)
        link.cut()
        link.run(behind)
        assert isinstance(behind.error, FramesRefused)
        assert link.server.streams["a"].applied == []
        assert link.finish(link.session.step(handle, X[1])).outputs.shape == (2,)


class TestPersonsDecide:
    def test_streams_that_are_gone_end_and_the_others_go_on(self) -> None:
        link = RingLink()
        handles = {name: link.open(name) for name in ("gone", "expired", "taken", "well")}
        steps = {name: link.session.step(handle, X[0]) for name, handle in handles.items()}
        del link.server.streams["gone"]
        link.server.expire("expired")
        link.server.take_over("taken")
        lose(link)
        link.run(*steps.values())
        codes = {name: step.error.code for name, step in steps.items() if isinstance(step.error, StreamEvicted)}
        assert codes == {"gone": Code.UNKNOWN_STREAM, "expired": Code.EXPIRED, "taken": Code.FENCED}
        assert steps["well"].result().outputs.shape == (2,)
        with pytest.raises(StreamEvicted, match="UNKNOWN_STREAM"):
            link.session.step(handles["gone"], X[0])

    def test_a_stream_that_was_taken_over_is_told_at_once(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.send(link.server.take_over("a"))
        link.deliver()
        with pytest.raises(StreamEvicted, match="FENCED"):
            link.session.step(handle, X[0])

    def test_a_server_that_lost_frames(self) -> None:
        link = RingLink()
        handle, other = link.open("a"), link.open("b")
        link.finish(link.session.step(handle, X[:5]))
        link.server.forget("a", 2)
        step = link.session.step(handle, X[5])
        lose(link)
        link.run(step)
        assert isinstance(step.error, DataLoss)
        assert (step.error.code, step.error.have, step.error.server_has) == (Code.DATA_LOSS, 5, 3)
        assert link.finish(link.session.step(other, X[0])).outputs.shape == (2,)
        again = link.finish(link.session.resume(["a"], None, 0, True, True))
        assert link.session.table.next_seqs(again).tolist() == [3]
        assert link.finish(link.session.step(again, X[3:5])).outputs.tolist() == reference(X[:5])[0][3:].tolist()

    def test_a_server_that_lost_a_frame_behind_one_whose_output_did_not_come(self) -> None:
        link = RingLink()
        group = link.open("a", "b")
        both = link.session.step(group, X[:2])
        link.advance()
        one = link.session.step(group, X[2:3], rows=[0])
        link.advance()
        link.serve()
        link.to_client.clear()
        link.serve()
        link.deliver()
        assert one.done
        link.server.forget("a", 2)
        lose(link)
        link.run(both)
        assert isinstance(both.error, DataLoss)
        assert [(failure.stream, failure.code) for failure in both.error.failures] == [("a", Code.DATA_LOSS)]
        assert both.error.outputs is not None
        assert both.error.outputs[1].tolist() == reference(X[1:2])[0][0].tolist()
        assert link.finish(link.session.step(group, X[:1], rows=[1])).outputs.shape == (1, 2)

    def test_outputs_that_are_gone(self) -> None:
        link = RingLink()
        handle = link.open("a")
        stream = link.server.streams["a"]
        stream.next_seq = 100
        lose(link)
        link.run(link.session.ping(0.0))
        with pytest.raises(DataLoss, match="OUTPUTS_GONE") as caught:
            link.session.step(handle, X[0])
        assert (caught.value.have, caught.value.server_has) == (0, 100)

    def test_other_numerics(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.server.refuses[Kind.RESUME] = Code.NUMERICS_CHANGED
        lose(link)
        link.run(link.session.ping(0.0))
        with pytest.raises(NumericsChanged, match="NUMERICS_CHANGED"):
            link.session.step(handle, X[0])


class TestOtherCalls:
    def test_questions_are_asked_again(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.finish(link.session.step(handle, X[:2]))
        calls: list[Call[Any]] = [
            link.session.ping(link.now),
            link.session.statistics(),
            link.session.read_state(handle),
        ]
        link.advance()
        link.cut()
        link.run(*calls)
        assert calls[1].result() == {"streams_open": 1.0}
        seqs, states = calls[2].result()
        assert seqs.tolist() == [2]
        assert floats_of(states, 2, 2)[0].tolist() == reference(X[:2])[1].tolist()

    def test_changes_of_models_are_not_asked_for_again(self) -> None:
        link = RingLink()
        move = SwapPolicy.parse("move")
        calls: list[Call[Any]] = [
            link.session.load_model("ears", "/m"),
            link.session.swap_model("ears", "/m", move),
            link.session.unload_model("ears", force=True),
        ]
        link.advance()
        link.cut()
        link.run(link.session.ping(link.now))
        for call, kind in zip(calls, ("LOAD", "SWAP", "UNLOAD"), strict=True):
            with pytest.raises(ConnectionFailed, match=f"before the server answered {kind}, which it may have done"):
                call.result()

    def test_an_opening_that_was_not_done_is_done(self) -> None:
        link = RingLink()
        opening = link.session.open(["a"], None, True)
        link.advance()
        link.cut()
        assert link.finish(opening).names == ("a",)

    @pytest.mark.parametrize("fork", [False, True])
    def test_an_opening_that_may_have_been_done_says_so(self, fork: bool) -> None:
        link = RingLink()
        source = link.open("source")
        opening = link.session.fork(source, ["a"]) if fork else link.session.open(["a"], None, True)
        link.advance()
        link.serve()
        link.cut()
        link.run(opening)
        with pytest.raises(ConnectionFailed, match="'a' was asked for, which may have been opened"):
            opening.result()
        assert link.finish(link.session.step(source, X[0])).outputs.shape == (2,)
        assert link.finish(link.session.resume(["a"], None, 0, True, True)).names == ("a",)

    def test_a_group_of_which_a_part_was_opened_says_so(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, max_message_bytes=2 * 201)))
        opening = link.session.open(["a", "b", "c"], None, False)
        link.advance()
        link.serve()
        link.deliver()
        link.cut()
        link.run(opening)
        with pytest.raises(ConnectionFailed, match="may have been opened"):
            opening.result()

    def test_a_refused_opening_is_refused_as_ever(self) -> None:
        link = RingLink()
        link.open("a")
        lose(link)
        opening = link.session.open(["a"], None, True)
        link.run(opening)
        with pytest.raises(StreamRefused, match="NAME_IN_USE"):
            opening.result()

    def test_an_opening_that_nobody_waits_for_is_not_asked_again(self) -> None:
        link = RingLink()
        opening = link.session.open(["a"], None, True)
        link.advance()
        link.cut()
        link.session.cancel(opening)
        link.run(opening)
        with pytest.raises(InstepError, match="was cancelled"):
            opening.result()
        assert link.server.streams == {}

    def test_a_close_that_was_not_done_is_done(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.finish(link.session.step(handle, X[:2]))
        closing = link.session.close(handle)
        link.advance()
        link.cut()
        assert floats_of(link.finish(closing), 2, 2)[0].tolist() == reference(X[:2])[1].tolist()
        assert link.server.streams == {}

    def test_a_close_that_was_done_has_no_final_state(self) -> None:
        link = RingLink()
        handle, group = link.open("a"), link.open("b", "c")
        closings = [link.session.close(handle), link.session.close(group)]
        link.advance()
        link.serve()
        link.serve()
        link.cut()
        link.run(*closings)
        with pytest.raises(StreamEvicted, match="UNKNOWN_STREAM"):
            closings[0].result()
        assert np.isnan(floats_of(closings[1].result(), 4)).all()
        assert link.session.table.is_empty

    def test_a_group_of_which_a_part_was_closed(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, max_message_bytes=2 * 16)))
        names = ["a", "b", "c"]
        handles = [link.open(name) for name in names]
        for handle in handles:
            link.finish(link.session.close(handle))
        link.server.info = replace(RING_INFO, max_message_bytes=2 * 16)
        opening = link.session.open(names, np.ones((3, 2, 2)), False)
        group = link.finish(opening)
        closing = link.session.close(group)
        link.advance()
        link.serve()
        link.deliver()
        link.cut()
        assert floats_of(link.finish(closing), 4).tolist() == [[1, 1, 1, 1]] * 3
        assert not group.has_ended
        assert link.server.streams == {}

    def test_a_reset_is_done_once_more_before_anything_that_comes_later(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.finish(link.session.step(handle, X[:2]))
        reset = link.session.reset(handle, np.ones((2, 2)))
        link.advance()
        later = link.session.step(handle, X[2])
        link.advance()
        while link.to_server[link.peer]:
            link.serve()
        assert link.server.kinds[-1] is Kind.RESET
        link.cut()
        link.run(reset, later)
        assert reset.error is None
        outputs = [*later.result().outputs[None], *link.finish(link.session.step(handle, X[3:5])).outputs]
        assert np.array_equal(outputs, reference(X[2:5], np.ones((2, 2), np.float32))[0])
        assert link.session.table.next_seqs(handle).tolist() == [5]

    def test_what_is_asked_of_a_stream_that_has_gone_says_so(self) -> None:
        link = RingLink()
        handle = link.open("a")
        calls: list[Call[Any]] = [
            link.session.read_state(handle),
            link.session.reset(handle, None),
            link.session.fork(handle, ["b"]),
        ]
        link.advance()
        link.cut()
        del link.server.streams["a"]
        link.run(*calls)
        for call in calls:
            with pytest.raises(StreamEvicted, match="UNKNOWN_STREAM"):
                call.result()

    def test_a_resume_is_asked_again(self) -> None:
        link = RingLink()
        handle = link.open("a")
        link.finish(link.session.step(handle, X[:3]))
        other = RingLink(link.server, name="other")
        resume = other.session.resume(["a"], 2, int(link.session.table.epochs(handle)[0]), False, True)
        other.advance()
        other.serve()
        other.cut()
        again = other.finish(resume)
        assert other.session.table.next_seqs(again).tolist() == [2]
        assert other.finish(other.session.step(again, X[2])).outputs.tolist() == reference(X[:3])[0][2].tolist()

    def test_a_resume_of_which_a_part_was_granted_is_asked_again(self) -> None:
        link = RingLink(RingServer(replace(RING_INFO, max_message_bytes=201)))  # room for one name
        link.open("a", "b")
        other = RingLink(link.server, name="other")
        resume = other.session.resume(["a", "b"], None, 0, True, False)
        other.advance()
        other.serve()
        other.deliver()
        other.cut()
        assert other.finish(resume).names == ("a", "b")

    def test_a_resume_that_another_one_followed_is_in_doubt(self) -> None:
        link = RingLink()
        epoch = int(link.session.table.epochs(link.open("a"))[0])
        other = RingLink(link.server, name="other")
        resume = other.session.resume(["a"], None, epoch, False, True)
        other.advance()
        other.cut()
        link.server.take_over("a")
        other.run(resume)
        with pytest.raises(ConnectionFailed, match="may have been resumed"):
            resume.result()
