"""BUSY, step by step; what dice make of it is in test_exactly_once."""

from __future__ import annotations

import pytest

from instep_client.protocol.codes import Code
from tests.support.fake_server import reference
from tests.support.session_link import Link, X, blocks, refuse


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
    link.run()
    outputs = [call.result().outputs.tolist() for call in calls[:4]]
    assert outputs == reference(X[:4])[0].tolist()
