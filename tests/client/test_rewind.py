"""Failures that come in an order in which only some of them say what the server expects now."""

from __future__ import annotations

import numpy as np

from instep_client.protocol.codes import Code
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, stepped
from tests.support.session_link import Link, X

Y: F32 = np.full((1, 1, 2), np.nan, np.float32)


def handle_with(count: int) -> tuple[Link, StreamHandle]:
    """A stream handle with frames 0 to count - 1 on their way, as requests 3 and up."""
    link = Link()
    handle = link.open("a")
    for x in X[:count]:
        link.session.step(handle, x)
        link.advance()
    return link, handle


def fail(link: Link, number: int, code: Code, expected: int) -> None:
    link.deliver(stepped(number, Y, [(0, 0, code, expected)]))


def test_the_next_refusal_sets_right_what_an_earlier_one_could_not_know() -> None:
    link, handle = handle_with(2)
    fail(link, 4, Code.NOT_FINITE, 1)
    assert link.session.table.next_seqs(handle).tolist() == [1]
    fail(link, 3, Code.STEP_FAILED, 0)
    assert link.session.table.next_seqs(handle).tolist() == [1]
    link.session.step(handle, X[0])
    link.advance()
    fail(link, 5, Code.SEQ_GAP, 0)
    assert link.session.table.next_seqs(handle).tolist() == [0]


def test_what_was_sent_before_says_nothing_of_what_was_sent_after() -> None:
    link, handle = handle_with(2)
    fail(link, 3, Code.NOT_FINITE, 0)
    link.session.step(handle, X[0])
    link.advance()
    fail(link, 4, Code.SEQ_GAP, 0)
    assert link.session.table.next_seqs(handle).tolist() == [1]


def test_a_repeated_seq_sets_the_stream_forward() -> None:
    link, handle = handle_with(1)
    fail(link, 3, Code.SEQ_REPEATED, 7)
    assert link.session.table.next_seqs(handle).tolist() == [7]
