"""Greeting, silence, farewell, and what ends a session. Frames are test_flow's, opening and closing test_openings'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.connection import Call, State
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    InvalidInput,
    MalformedMessage,
    Refused,
    StreamEvicted,
)
from instep_client.protocol.wire import PROTOCOL_VERSION, Kind
from instep_client.session import Session
from tests.support.fake_server import INFO, Message, error, evicted, goodbye, pack, stepped, welcome
from tests.support.session_link import Link, headers, refuse

X = np.ones(3, np.float32)


def test_the_first_message_is_hello_and_its_answer_is_the_info() -> None:
    link = Link(greet=False)
    assert headers(link.advance()) == [[Kind.HELLO, 1, PROTOCOL_VERSION, "test", ""]]
    with pytest.raises(ClientClosed):
        _ = link.session.info
    with pytest.raises(ClientClosed):
        link.session.open(["a"], None, single=True)
    link.run()
    assert link.session.state is State.OPEN
    assert link.session.info == INFO


def test_a_refused_hello_says_why() -> None:
    link = Link(greet=False)
    link.advance()
    refuse(link, Code.WRONG_VERSION)
    link.deliver()
    with pytest.raises(Refused):
        link.session.greeting.result()
    with pytest.raises(ConnectionFailed):
        link.session.open(["a"], None, single=True)


def test_another_protocol_version_is_no_welcome() -> None:
    link = Link(greet=False)
    link.advance()
    link.deliver(welcome(1, replace(INFO, protocol_version=2)))
    with pytest.raises(MalformedMessage):
        link.session.greeting.result()


def test_nobody_answers_hello() -> None:
    link = Link(timeout_s=4.0, greet=False)
    link.advance()
    assert link.session.deadline() == link.now + 4.0
    assert link.advance(3.9) == []
    assert not link.session.greeting.done
    link.advance(0.1)
    with pytest.raises(ConnectionFailed):
        link.session.greeting.result()
    assert link.session.deadline() is None


def test_silence_is_probed_at_half_the_timeout_and_ends_the_session_at_all_of_it() -> None:
    link = Link(timeout_s=4.0)
    handle = link.open("a")
    link.advance(1000.0)  # nothing is asked for: silence means nothing
    assert link.session.deadline() is None
    step = link.session.step(handle, X)
    assert headers(link.advance())[0][0] is Kind.STEP
    assert link.session.deadline() == link.now + 2.0
    assert link.advance(1.9) == []
    assert [header[0] for header in headers(link.advance(0.1))] == [Kind.PING]
    assert link.session.deadline() == link.now + 2.0
    assert link.advance(1.9) == []
    assert not step.done
    link.advance(0.1)
    with pytest.raises(ConnectionFailed):
        step.result()
    with pytest.raises(ConnectionFailed):
        link.session.step(handle, X)


def test_a_client_that_was_held_up_asks_before_it_gives_the_server_up() -> None:
    link = Link(timeout_s=4.0)
    step = link.session.step(link.open("a"), X)
    link.advance()
    link.serve()  # the answer waits in the socket
    assert [header[0] for header in headers(link.advance(1000.0))] == [Kind.PING]
    assert link.session.deadline() == link.now + 2.0
    link.settle_client()
    assert step.done
    assert not step.error


@pytest.mark.parametrize("number", [0, 7, 2**62])
def test_the_servers_ping_is_answered_with_its_own_number(number: int) -> None:
    link = Link(timeout_s=4.0)
    step = link.session.step(link.open("a"), X)
    link.advance()
    link.deliver([pack(Kind.PING, number)])
    assert headers(link.advance()) == [[Kind.PONG, number]]
    assert not step.done


def test_ping_measures_and_statistics_are_read() -> None:
    link = Link()
    ping, statistics = link.session.ping(link.now), link.session.statistics()
    link.advance()
    link.serve()
    link.now += 0.25
    link.settle_client()
    assert ping.result() == 0.25
    assert statistics.result() == {"streams_open": 0.0, "blocks": 0.0, "ready": 1.0}


def test_goodbye_ends_everything_that_was_not_answered_before_it() -> None:
    link = Link()
    handle = link.open("a")
    answered, unanswered = link.session.step(handle, X), link.session.step(handle, X)
    link.advance()
    link.serve(1)
    link.settle_client()
    link.deliver(goodbye())
    assert answered.result().outputs.tolist() == [3, 4]
    for call in (lambda: unanswered.result(), lambda: link.session.step(handle, X), lambda: link.session.ping(0)):
        with pytest.raises(ConnectionFailed):
            call()
    link.deliver(stepped(4, np.zeros((1, 1, 2), np.float32)))  # too late: dropped
    assert link.session.leave() is None


@pytest.mark.parametrize(
    "message",
    [
        [],
        [b"\xc1"],
        [b"\x00" * 5000],
        [pack(Kind.HELLO, 1, 1, "x")],
        [pack(Kind.PONG, 99)],
        [pack(Kind.PONG, 3)],
        [pack(Kind.STATISTICS, 3, [])],
        stepped(3, np.zeros((1, 2, 2), np.float32)),
        stepped(3, np.zeros((1, 1, 3), np.float32)),
        stepped(2, np.zeros((1, 1, 2), np.float32)),
        welcome(3, INFO),
        [pack(Kind.ERROR, 3, 9999, "x", 0)],
        [pack(Kind.EVICTED, 0, 1, 106, "x"), b"\0" * 7],
        [pack(Kind.GOODBYE, 0, 1)],
    ],
)
def test_a_malformed_message_fails_what_waits(message: Message) -> None:
    link = Link()
    handle = link.open("a")
    step = link.session.step(handle, X)
    link.advance()
    ping = link.session.ping(0.0)
    link.deliver(message)
    for call in (step, ping):
        assert isinstance(call, Call)
        with pytest.raises(MalformedMessage):
            call.result()
    with pytest.raises(MalformedMessage):
        link.session.step(handle, X)


def test_eviction_fails_what_waits_and_what_comes_later_of_that_stream_alone() -> None:
    link = Link()
    mine, other = link.open("mine"), link.open("other")
    kept = link.session.step(mine, X, keep=True)
    step, well = link.session.step(mine, X), link.session.step(other, X)
    link.advance()
    link.deliver(evicted([1, 99]))
    waiting = (lambda: step.result(), lambda: kept.result(), lambda: link.session.step(mine, X))
    for call in waiting:
        with pytest.raises(StreamEvicted):
            call()
    assert link.session.take(mine) is kept
    with pytest.raises(StreamEvicted):
        link.session.outputs_end(mine)
    link.run()
    assert well.result().outputs.tolist() == [3, 4]
    assert link.session.step(other, X)


def test_eviction_of_one_of_a_group_lets_the_others_step() -> None:
    link = Link(replace(INFO, credit_frames=4))
    group = link.open("a", "b", "c")
    sent = link.session.step(group, np.ones((3, 3)))
    waiting = link.session.step(group, np.ones((3, 3)))
    unconcerned = link.session.step(group, np.ones((2, 3)), rows=[0, 2])
    link.advance()
    link.rules.end([2])
    link.deliver(evicted([2], Code.STATE_LOST))
    with pytest.raises(StreamEvicted):
        link.session.step(group, np.ones((3, 3)))
    link.run()
    for call, outputs in ((sent, [3, 4]), (waiting, [4.5, 5.5])):
        with pytest.raises(StreamEvicted):
            call.result()
        refused: Any = call.error
        assert [(f.stream, f.code) for f in refused.failures] == [("b", Code.STATE_LOST)]
        assert refused.outputs[[0, 2]].tolist() == [outputs, outputs]
        assert np.isnan(refused.outputs[1]).all()
    assert unconcerned.result().outputs.tolist() == [[5.25, 6.25], [5.25, 6.25]]


def test_leaving_closes_the_streams_and_hears_that_the_server_knows() -> None:
    link = Link()
    link.open("b", "c")
    step = link.session.step(link.open("a"), X)
    link.advance()
    close_all = link.session.leave()
    assert close_all is not None
    assert [header[0] for header in headers(link.advance())] == [Kind.CLOSE, Kind.PING]
    with pytest.raises(ClientClosed):
        step.result()
    link.serve()
    assert link.rules.names == {}
    link.deliver(stepped(4, np.zeros((1, 1, 2), np.float32)))
    link.settle_client()
    assert close_all.done
    assert link.session.leave() is None
    with pytest.raises(ClientClosed):
        link.session.ping(0.0)


@pytest.mark.parametrize("is_refused", [False, True])
def test_leaving_closes_what_is_about_to_be_opened(is_refused: bool) -> None:
    info = replace(INFO, max_message_bytes=201 * 2)
    link = Link(info)
    link.open("kept")
    opening = link.session.open(["a", "kept" if is_refused else "b", "c"], None, single=False)
    assert [header[0] for header in headers(link.advance())] == [Kind.OPEN, Kind.OPEN]
    link.serve(1)
    link.settle_client()
    link.session.cancel(opening)
    unsent = link.session.open(["d"], None, single=True)
    farewell = link.session.leave()
    assert farewell is not None
    with pytest.raises(ClientClosed):
        unsent.result()
    assert [header[0] for header in headers(link.advance())] == [Kind.CLOSE] * (1 if is_refused else 2)
    assert not farewell.done
    link.run()
    assert farewell.done
    assert link.rules.names == {}, "a and b were granted, c was on its way, d was never asked for"


@pytest.mark.parametrize(("name", "timeout_s"), [("a\nb", 1.0), ("a" * 201, 1.0), ("", 0.0), ("", float("nan"))])
def test_bad_names_and_timeouts_are_refused(name: str, timeout_s: float) -> None:
    with pytest.raises(InvalidInput):
        Session("tcp://somewhere:1", name, timeout_s)


def test_an_error_about_no_request_ends_the_session() -> None:
    link = Link()
    step = link.session.step(link.open("a"), X)
    link.advance()
    link.deliver(error(0, Code.MALFORMED))
    with pytest.raises(ConnectionFailed):
        step.result()
