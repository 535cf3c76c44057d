"""Requests whose answer was lost with the connection: they are repeated where that does no harm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instep_client.connection import Call
from instep_client.protocol.errors import ConnectionFailed, StreamEvicted
from instep_client.protocol.wire import Kind
from tests.support.fake_server import reference
from tests.support.session_link import X, lasting
from tests.support.states import floats_of


def test_questions_are_asked_again() -> None:
    link = lasting()
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
    assert calls[1].result()["streams_open"] == 1.0
    seqs, states = calls[2].result()
    assert seqs.tolist() == [2]
    assert floats_of(states, 2, 2)[0].tolist() == reference(X[:2])[1].tolist()


@pytest.mark.parametrize("fork", [False, True])
def test_an_opening_that_may_have_been_done_says_so(fork: bool) -> None:
    link = lasting()
    source = link.open("source")
    opening = link.session.fork(source, ["a"]) if fork else link.session.open(["a"], None, True)
    link.advance()
    link.serve(1)
    link.cut()
    link.run(opening)
    with pytest.raises(ConnectionFailed):
        opening.result()
    assert link.finish(link.session.step(source, X[0])).outputs.shape == (2,)
    assert link.finish(link.session.resume(["a"], None, 0, True, True)).names == ("a",)


def test_a_close_that_was_done_has_no_final_state() -> None:
    link = lasting()
    handle, group = link.open("a"), link.open("b", "c")
    closings = [link.session.close(handle), link.session.close(group)]
    link.advance()
    link.serve(1)
    link.serve(1)
    link.cut()
    link.run(*closings)
    with pytest.raises(StreamEvicted):
        closings[0].result()
    assert np.isnan(floats_of(closings[1].result(), 4)).all()
    assert link.session.table.is_empty


def test_a_reset_is_done_once_more_before_anything_that_comes_later() -> None:
    link = lasting()
    handle = link.open("a")
    link.finish(link.session.step(handle, X[:2]))
    reset = link.session.reset(handle, np.ones((2, 2)))
    link.advance()
    later = link.session.step(handle, X[2])
    link.advance()
    link.serve()
    assert link.rules.kinds[-1] is Kind.RESET
    link.cut()
    link.run(reset, later)
    assert reset.error is None
    outputs = [*later.result().outputs[None], *link.finish(link.session.step(handle, X[3:5])).outputs]
    assert np.array_equal(outputs, reference(X[2:5], np.ones((2, 2), np.float32))[0])
    assert link.session.table.next_seqs(handle).tolist() == [5]


def test_a_resume_is_asked_again() -> None:
    link = lasting()
    handle = link.open("a")
    link.finish(link.session.step(handle, X[:3]))
    other = lasting(rules=link.rules, name="other")
    resume = other.session.resume(["a"], 2, int(link.session.table.epochs(handle)[0]), False, True)
    other.advance()
    other.serve(1)
    other.cut()
    again = other.finish(resume)
    assert other.session.table.next_seqs(again).tolist() == [2]
    assert other.finish(other.session.step(again, X[2])).outputs.tolist() == reference(X[:3])[0][2].tolist()


def test_a_resume_that_another_one_followed_is_in_doubt() -> None:
    link = lasting()
    epoch = int(link.session.table.epochs(link.open("a"))[0])
    other = lasting(rules=link.rules, name="other")
    resume = other.session.resume(["a"], None, epoch, False, True)
    other.advance()
    other.cut()
    link.rules.take_over("a")
    other.run(resume)
    with pytest.raises(ConnectionFailed):
        resume.result()
