"""Calls that users seldom mix: streams end, sleep, are resumed twice and closed while answers about them are due."""

from __future__ import annotations

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ClientClosed, StreamEvicted
from instep_client.protocol.wire import Kind
from tests.support.fake_server import F32, evicted, reference
from tests.support.ring_link import RingLink
from tests.support.step_messages import parts

X: F32 = np.random.default_rng(5).standard_normal((20, 3)).astype(np.float32)


def test_a_claim_that_is_answered_late_says_nothing_of_the_next_stream_in_its_row() -> None:
    link = RingLink()
    a = link.open("a")
    link.send(link.server.hibernate("a"))
    link.run()
    link.session.step(a, X[0])
    link.advance()  # the client's own claim
    resumed = link.session.resume(["a"], 0, int(link.session.table.epochs(a)[0]), False, True)
    link.advance()
    link.serve()
    link.serve()
    late = link.to_client.popleft()
    link.deliver()
    assert resumed.done
    assert resumed.error is None
    with pytest.raises(StreamEvicted):
        link.session.close(a)
    link.advance()
    opened = link.session.open(["b"], None, True)
    link.advance()
    link.serve()
    link.deliver()
    link.to_client.append(late)
    b = link.finish(opened)
    assert b.rows.tolist() == a.rows.tolist()
    outputs = link.finish(link.session.step(b, X[1])).outputs
    assert np.array_equal(outputs, reference(X[1:2])[0][0])
    assert len(link.server.streams["b"].applied) == 1
    assert not link.server.streams["a"].applied


def exchange(link: RingLink) -> None:
    """A few messages, fewer than are needed when somebody asks for ever."""
    for _ in range(20):
        link.advance(0.01)
        while link.to_server[link.peer]:
            link.serve()
        while link.to_client:
            link.deliver()


def test_a_stream_that_ends_while_its_claim_is_refused_is_not_claimed_again() -> None:
    link = RingLink()
    a, other = link.open("a"), link.open("other")
    link.session.step(a, X[0])
    link.advance()
    link.send(link.server.hibernate("a"))
    link.serve()
    while link.to_client:
        link.deliver()
    link.advance()  # the client's own claim
    link.session.resume(["a"], None, 0, True, True)
    link.advance()
    link.server.room = 1
    link.serve()
    link.server.room = None
    link.serve()
    link.to_client.reverse()
    while link.to_client:
        link.deliver()
    link.server.kinds.clear()
    call = link.session.step(other, X[1])
    exchange(link)
    assert call.done
    assert link.server.kinds == [Kind.STEP]


def test_a_stream_that_has_ended_does_not_hibernate() -> None:
    link = RingLink()
    a, other = link.open("a"), link.open("other")
    ended = link.session.step(a, X[0])
    link.advance()
    link.to_client.append(evicted([link.server.streams["a"].handle], Code.IDLE))
    link.send(link.server.hibernate("a"))
    link.server.kinds.clear()
    call = link.session.step(other, X[1])
    exchange(link)
    assert isinstance(ended.error, StreamEvicted)
    assert call.done
    assert link.server.kinds == [Kind.STEP, Kind.STEP]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_read_of_a_stream_that_ends_and_is_closed_fails_alone(is_lost: bool) -> None:
    link = RingLink()
    a, other = link.open("a"), link.open("other")
    read = link.session.read_state(a)
    link.advance()
    link.to_client.append(evicted([link.server.streams["a"].handle], Code.IDLE))
    link.server.expire("a")
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


@pytest.mark.parametrize("is_lost", [False, True])
def test_frames_of_a_stream_that_finds_no_room_hold_up_no_other_stream(is_lost: bool) -> None:
    link = RingLink()
    other, group = link.open("other"), link.open(*"abcdefghi")
    sent = [link.session.step(group, np.stack([x] * 9)) for x in X[:7]]
    link.advance()
    for name in "abcdefghi":
        link.send(link.server.hibernate(name))  # crosses the frames
    link.server.room = 1
    if is_lost:
        link.cut()
    exchange(link)
    link.now += 1.0
    step = link.session.step(other, X[0])
    later = link.session.step(group, np.stack([X[7]] * 9))
    link.run(step)
    assert np.array_equal(step.result().outputs, reference(X[:1])[0][0])
    assert not sent[0].done
    link.server.room = None
    sent_beside = [link.session.step(other, x) for x in X[1:4]]
    link.advance(1.0)
    while link.to_server[link.peer]:
        link.serve()
    link.to_client.reverse()  # RESUMED arrives before the outputs: those frames count against the credit
    most = 0
    for _ in range(40):
        if link.to_client:
            link.deliver()
        link.advance(0.05)
        while link.to_server[link.peer]:
            link.serve()
        heads = [parts(message)[0] for message in link.to_client]
        most = max(most, sum(head[2] * head[3] for head in heads if head[0] == Kind.STEPPED))
    assert all(call.done for call in sent_beside)
    assert 50 < most <= link.server.info.credit_frames
    for call, expected in zip([*sent, later], reference(X[:8])[0], strict=True):
        assert np.array_equal(call.result().outputs, np.stack([expected] * 9))
    for name in "abcdefghi":
        assert len(link.server.streams[name].applied) == 8
