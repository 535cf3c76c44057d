"""Streams that hibernate on the server: whoever uses them does not notice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, FramesRefused, StreamEvicted
from instep_client.protocol.wire import Kind
from tests.support.fake_server import F32, RING_INFO, evicted, reference
from tests.support.session_link import Link, lasting, lose

X: F32 = np.random.default_rng(5).standard_normal((20, 3)).astype(np.float32)


def exchange(link: Link, rounds: int = 20) -> None:
    """A few messages, while nothing wakes."""
    for _ in range(rounds):
        link.advance(0.01)
        link.serve()
        link.settle_client()


def test_a_frame_wakes_its_stream_and_no_other_and_is_applied_once() -> None:
    link = lasting()
    group = link.open("a", "b", "c")
    first = link.finish(link.session.step(group, np.stack([X[:3]] * 3, axis=1)))
    link.rules.hibernate("a")
    link.rules.hibernate("b")
    link.rules.kinds.clear()
    second = link.finish(link.session.step(group, np.stack([X[3]] * 2), rows=[1, 2]))
    assert link.rules.kinds == [Kind.STEP, Kind.STEP]
    assert [name for name, stream in link.rules.streams.items() if stream.is_asleep] == ["a"]
    assert np.array_equal(np.concatenate([first.outputs[:, 1], second.outputs[:1]]), reference(X[:4])[0])


def test_frames_of_a_stream_wait_in_order_while_others_go_on() -> None:
    link = lasting()
    a, slow, other = link.open("a"), link.open("slow"), link.open("other")
    link.rules.hibernate("a")
    late = link.session.step(slow, X[0])
    link.advance()
    on_its_way = link.to_server.popleft()
    calls = [link.session.step(a, X[:2]), link.session.step(a, X[2])]
    exchange(link)
    calls.append(link.session.step(a, X[3]))
    beside = [link.session.step(other, x) for x in X[:3]]
    exchange(link)
    assert all(call.done for call in beside)
    assert not any(call.done for call in [late, *calls])
    link.to_server.append(on_its_way)
    link.run(late, *calls)
    outputs = np.concatenate([call.result().outputs.reshape(-1, 2) for call in calls])
    assert np.array_equal(outputs, reference(X[:4])[0])


def test_a_server_that_falls_silent_while_a_stream_wakes_is_given_up() -> None:
    link = lasting(reconnect_s=0.0)
    a = link.open("a")
    link.rules.hibernate("a")
    call = link.session.step(a, X[0])
    exchange(link)
    for _ in range(2):
        deadline = link.session.deadline()
        assert deadline is not None
        link.advance(deadline - link.now)
    assert isinstance(call.error, ConnectionFailed)


@pytest.mark.parametrize("code", [Code.TOO_MANY_STREAMS, Code.STEP_FAILED])
def test_what_waits_fails_where_a_stream_cannot_be_woken_and_it_can_be_later(code: Code) -> None:
    link = lasting()
    a, other = link.open("a"), link.open("other")
    link.rules.hibernate("a")
    waits, beside = [link.session.step(a, x) for x in X[:2]], link.session.step(other, X[0])
    exchange(link)
    link.send(link.rules.wake(code))
    exchange(link)
    assert beside.done
    for call in waits:
        assert isinstance(call.error, FramesRefused)
        assert call.error.code is code
    outputs = link.finish(link.session.step(a, X[:2])).outputs
    assert np.array_equal(outputs, reference(X[:2])[0])


def test_a_request_is_repeated_for_streams_that_woke_under_new_handles_before_it_arrived() -> None:
    link = lasting()
    link.open("a", "b")
    handle = link.open("s", "t")
    link.finish(link.session.step(handle, np.stack([X[:2]] * 2, axis=1)))
    for ask in (
        lambda: link.session.read_state(handle),
        lambda: link.session.reset(handle, np.ones((2, 2, 2), np.float32)),
        lambda: link.session.fork(handle, ["copy of s", "copy of t"]),
        lambda: link.session.close(handle),
    ):
        link.rules.hibernate("s")
        link.rules.wanted["s"] = None
        call = ask()
        link.advance()
        link.send(link.rules.wake())  # before it reads the request
        link.run(call)
        assert call.error is None
    assert set(link.rules.streams) == {"a", "b", "copy of s", "copy of t"}
    for name in "st":
        assert np.array_equal(link.rules.closed[name].state, np.ones(4))


def test_streams_are_claimed_in_portions_that_find_room_though_they_sleep() -> None:
    link = lasting(replace(RING_INFO, max_streams=8))
    group = link.open(*"abcde")
    link.finish(link.session.step(group, np.stack([X[:2]] * 5, axis=1)))
    link.rules.hibernate("a")
    call = link.session.step(group, np.stack([X[2]] * 5))
    exchange(link)
    lose(link)
    link.rules.kinds.clear()
    assert np.array_equal(link.finish(call).outputs, np.stack([reference(X[:3])[0][2]] * 5))
    assert link.rules.kinds.count(Kind.RESUME) == 3


@pytest.mark.parametrize("code", [Code.TOO_MANY_STREAMS, Code.STEP_FAILED])
def test_a_stream_that_finds_no_room_is_claimed_again_until_it_does(code: Code) -> None:
    link = lasting()
    a = link.open("a")
    call = link.session.step(a, X[0])
    lose(link)
    link.rules.refuses = code
    link.rules.kinds.clear()
    link.run(call, at_most_s=60.0)
    assert not call.done
    assert 20 < link.rules.kinds.count(Kind.RESUME) < 80, "it is claimed again, and not in one go"
    assert link.rules.kinds.count(Kind.HELLO) == 1
    link.rules.refuses = None
    assert np.array_equal(link.finish(call).outputs, reference(X[:1])[0][0])


def test_a_stream_that_finds_no_room_in_time_has_ended_here_and_not_on_the_server() -> None:
    link = lasting(reconnect_s=20.0)
    a = link.open("a")
    link.finish(link.session.step(a, X[0]))
    call = link.session.step(a, X[1])
    lose(link)
    link.rules.refuses = Code.TOO_MANY_STREAMS
    lost_at = link.now
    link.run(call, at_most_s=30.0)
    assert isinstance(call.error, StreamEvicted)
    assert call.error.code is Code.TOO_MANY_STREAMS
    assert 20.0 <= link.now - lost_at < 25.0
    link.rules.refuses = None
    resumed = link.finish(link.session.resume(["a"], 1, link.session.table.epochs(a), False, single=True))
    assert np.array_equal(link.finish(link.session.step(resumed, X[1])).outputs, reference(X[:2])[0][1])


def test_leaving_closes_streams_that_sleep() -> None:
    link = lasting()
    link.open("a")
    link.open("b", "c")
    for name in "ab":
        link.rules.hibernate(name)
    farewell = link.session.leave()
    assert farewell is not None
    link.advance()
    link.serve()
    link.deliver()
    assert not link.rules.streams


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_read_of_a_stream_that_ends_and_is_closed_fails_alone(is_lost: bool) -> None:
    link = lasting()
    a, other = link.open("a"), link.open("other")
    read = link.session.read_state(a)
    link.advance()
    link.to_client.append(evicted([link.rules.streams["a"].handle], Code.IDLE))
    link.rules.expire("a")
    link.deliver()
    with pytest.raises(StreamEvicted):
        link.session.close(a)
    link.advance()
    assert a.closed
    if is_lost:
        link.cut()
    link.run(read)
    with pytest.raises(ClientClosed if is_lost else StreamEvicted):
        read.result()
    assert np.array_equal(link.finish(link.session.step(other, X[1])).outputs, reference(X[1:2])[0][0])


def test_a_copy_half_of_which_was_made_over_a_lost_connection_is_in_doubt() -> None:
    link = lasting()
    handle = link.open("s", "t")
    link.rules.hibernate("t")
    link.rules.wanted["t"] = None
    call = link.session.fork(handle, ["copy of s", "copy of t"])
    link.advance()
    link.send(link.rules.wake())
    link.serve(1)
    link.settle_client()
    link.cut()
    link.run(call)
    assert isinstance(call.error, ConnectionFailed)
    assert set(link.rules.streams) == {"s", "t", "copy of s"}
