"""BUSY, step by step; what dice make of it is in test_exactly_once."""

from __future__ import annotations

import numpy as np
import pytest

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import InstepError, StreamEvicted
from tests.support.fake_server import evicted, reference, stepped
from tests.support.session_link import BAD, Link, X, blocks, ending, refusal, refuse, sizes


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


def test_answers_still_on_the_way_are_waited_for() -> None:
    link = Link()
    a, b = link.open("a"), link.open("b")
    link.session.step(a, X[0])
    link.advance()
    link.session.step(b, X[0])
    link.advance()
    held = link.to_server.popleft()
    busy(link)
    link.deliver()
    assert link.session.deadline() == link.now + 5.0  # the watch for silence, nothing sooner
    assert link.advance(1.0) == []
    link.to_server.append(held)
    link.serve()
    link.deliver()
    assert sizes(link.advance()) == [(1, 1)]


def test_the_longest_wait_counts() -> None:
    link = Link()
    handle = link.open("a")
    for x in X[:2]:
        link.session.step(handle, x)
        link.advance()
    busy(link, 9000)
    busy(link, 1000)
    link.settle_client()
    assert link.advance(0.008) == []
    assert sizes(link.advance(0.002)) == [(1, 1), (1, 1)]


def test_only_columns_behind_a_refused_frame_are_sent_again() -> None:
    link = Link()
    group = link.open("a", "b")
    first = link.session.step(group, X[:1], rows=[0])
    link.advance()
    both = link.session.step(group, X[1:3])
    link.advance()
    busy(link, 0)
    link.serve()
    link.settle_client()
    assert blocks(link.advance()) == [([(1, 0)], [[0]]), ([(1, 1)], [[3]])]
    link.settle()
    assert first.result().outputs.tolist() == reference(X[:1])[0].tolist()
    assert both.result().outputs.tolist() == [reference(X[:2])[0][1].tolist(), reference(X[2:3])[0][0].tolist()]


def test_a_gap_behind_another_refusal_is_told_not_sent_again() -> None:
    link = Link()
    handle = link.open("a")
    calls = [link.session.step(handle, x) for x in (BAD, X[0], X[1])]
    link.advance()
    link.serve(1)
    busy(link, 0)
    link.serve()
    link.settle()
    assert [refusal(call).code for call in calls] == [Code.NOT_FINITE, Code.SEQ_GAP, Code.SEQ_GAP]
    assert len(link.rules.blocks) == 2  # the refused frame and the last: the one answered BUSY was given up


def test_a_gap_after_all_is_well_again_is_told() -> None:
    link = Link()
    handle = link.open("a")
    link.session.step(handle, X[0])
    link.advance()
    busy(link, 0)
    link.settle()
    step = link.session.step(handle, X[1])
    link.advance()
    link.deliver(stepped(5, np.full((1, 1, 2), np.nan, np.float32), [(0, 0, Code.SEQ_GAP, 0)]))
    assert refusal(step).code is Code.SEQ_GAP


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
