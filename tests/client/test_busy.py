"""BUSY, step by step; what dice make of it is in test_exactly_once."""

from __future__ import annotations

import pytest

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import InstepError, StreamEvicted
from tests.support.fake_server import evicted, reference
from tests.support.session_link import Link, X, blocks, ending, refuse


def busy(link: Link, retry_after_us: int = 2000) -> None:
    refuse(link, Code.BUSY, retry_after_us)


def test_everything_waits_then_refused_frames_go_first_in_their_order() -> None:
    link = Link()
    a, b = link.open("a"), link.open("b")
    calls = []
    for x in X[:3]:
        calls.append(link.session.step(a, x))
        link.advance()
    busy(link)  # frame 0: refused
    link.serve()  # frames 1 and 2: gaps
    link.deliver()
    calls += [link.session.step(a, X[3]), link.session.step(b, X[0])]
    assert link.advance() == []
    link.settle_client()
    assert link.advance(0.0019) == []
    assert link.session.deadline() == pytest.approx(link.now + 0.0001)
    assert blocks(link.advance(0.0002)) == [
        ([(1, 0)], [[0]]),
        ([(1, 1)], [[3]]),
        ([(1, 2)], [[6]]),
        ([(1, 3), (2, 0)], [[9, 0]]),
    ]
    link.settle()
    outputs = [call.result().outputs.tolist() for call in calls[:4]]
    assert outputs == reference(X[:4])[0].tolist()


def test_frames_of_a_stream_evicted_meanwhile_are_given_up() -> None:
    link = Link()
    group, lone = link.open("a", "b"), link.open("c")
    many, one = link.session.step(group, X[:2]), link.session.step(lone, X[0])
    link.advance()
    busy(link)
    busy(link)
    link.settle_client()
    link.rules.end([1, 3])
    link.deliver(evicted([1, 3]))
    link.advance(1.0)
    link.settle()
    error, outputs = ending(many)
    assert [(f.stream, f.code) for f in error.failures] == [("a", Code.IDLE)]
    assert SENTENCES[Code.IDLE] in error.sentence
    assert outputs[1].tolist() == reference(X[1:2])[0][0].tolist()
    assert isinstance(one.error, StreamEvicted)


def test_the_end_of_the_session_ends_what_waits_to_be_sent_again() -> None:
    link = Link()
    step = link.session.step(link.open("a"), X[0])
    link.advance()
    busy(link)
    link.settle_client()
    link.session.fail(InstepError, "over")
    assert str(step.error) == "over"
