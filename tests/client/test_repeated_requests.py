"""Requests whose answer was lost with the connection: they are repeated where that does no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.connection import Call
from instep_client.protocol.errors import ConnectionFailed, StreamEvicted
from instep_client.protocol.wire import Kind
from tests.support.fake_server import reference
from tests.support.ring_link import RingLink
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X
from tests.support.states import floats_of


def test_questions_are_asked_again() -> None:
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


def test_an_opening_that_was_not_done_is_done() -> None:
    link = RingLink()
    opening = link.session.open(["a"], None, True)
    link.advance()
    link.cut()
    assert link.finish(opening).names == ("a",)


@pytest.mark.parametrize("fork", [False, True])
def test_an_opening_that_may_have_been_done_says_so(fork: bool) -> None:
    link = RingLink()
    source = link.open("source")
    opening = link.session.fork(source, ["a"]) if fork else link.session.open(["a"], None, True)
    link.advance()
    link.serve()
    link.cut()
    link.run(opening)
    with pytest.raises(ConnectionFailed):
        opening.result()
    assert link.finish(link.session.step(source, X[0])).outputs.shape == (2,)
    assert link.finish(link.session.resume(["a"], None, 0, True, True)).names == ("a",)


def test_a_group_of_which_a_part_was_opened_says_so() -> None:
    link = RingLink(RingServer(replace(RING_INFO, max_message_bytes=2 * 201)))
    opening = link.session.open(["a", "b", "c"], None, False)
    link.advance()
    link.serve()
    link.deliver()
    link.cut()
    link.run(opening)
    with pytest.raises(ConnectionFailed):
        opening.result()


def test_a_close_that_was_not_done_is_done() -> None:
    link = RingLink()
    handle = link.open("a")
    link.finish(link.session.step(handle, X[:2]))
    closing = link.session.close(handle)
    link.advance()
    link.cut()
    assert floats_of(link.finish(closing), 2, 2)[0].tolist() == reference(X[:2])[1].tolist()
    assert link.server.streams == {}


def test_a_close_that_was_done_has_no_final_state() -> None:
    link = RingLink()
    handle, group = link.open("a"), link.open("b", "c")
    closings = [link.session.close(handle), link.session.close(group)]
    link.advance()
    link.serve()
    link.serve()
    link.cut()
    link.run(*closings)
    with pytest.raises(StreamEvicted):
        closings[0].result()
    assert np.isnan(floats_of(closings[1].result(), 4)).all()
    assert link.session.table.is_empty


def test_a_reset_is_done_once_more_before_anything_that_comes_later() -> None:
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


def test_a_resume_is_asked_again() -> None:
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


def test_a_resume_that_another_one_followed_is_in_doubt() -> None:
    link = RingLink()
    epoch = int(link.session.table.epochs(link.open("a"))[0])
    other = RingLink(link.server, name="other")
    resume = other.session.resume(["a"], None, epoch, False, True)
    other.advance()
    other.cut()
    link.server.take_over("a")
    other.run(resume)
    with pytest.raises(ConnectionFailed):
        resume.result()
