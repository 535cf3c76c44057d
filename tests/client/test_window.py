"""The window: how far a stream's frames go ahead of its outputs, and what is acknowledged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import COLUMN, Kind
from tests.support.fake_server import INFO, Message, reference, stepped
from tests.support.session_link import Link, X, refusal, sizes
from tests.support.step_messages import parts


def acks(messages: list[Message]) -> list[list[int]]:
    """What each STEP acknowledges, a number a column."""
    arrays = [arrays for header, arrays in map(parts, messages) if header[0] == Kind.STEP]
    return [np.frombuffer(columns, COLUMN)["acked"].tolist() for columns, _ in arrays]


def test_chunks_are_cut_to_half_a_window_and_wait_for_outputs_beyond_it() -> None:
    link = Link(replace(INFO, window_frames=8))
    handle = link.open("a")
    step = link.session.step(handle, X[:20])
    sent = link.advance()
    assert sizes(sent) == [(4, 1), (4, 1)]
    assert link.advance() == []
    link.serve(1)
    link.deliver()
    sent = link.advance()
    assert sizes(sent) == [(4, 1)]
    assert acks(sent) == [[4]]
    assert link.finish(step).outputs.tolist() == reference(X[:20])[0].tolist()


def test_outputs_that_come_out_of_order_count_when_the_earlier_ones_have_come() -> None:
    link = Link(replace(INFO, window_frames=5))
    group = link.open("a", "b")
    link.session.step(group, X[:2])
    first = link.advance()
    for x in X[:4]:
        link.session.step(group, x[None], rows=[0])
    later = link.advance()
    assert sizes(first + later) == [(1, 2), *[(1, 1)] * 4]
    y = np.zeros((1, 1, 2), np.float32)
    for number in (4, 5, 6, 7):
        link.deliver(stepped(number, y))
    chunk = link.session.step(group, np.ones((2, 1, 3)), rows=[0])
    assert link.advance() == []  # four outputs have come, and none is acknowledged
    link.deliver(stepped(3, np.zeros((1, 2, 2), np.float32)))
    assert acks(link.advance()) == [[5]]
    assert not chunk.done


def test_outputs_that_are_no_longer_kept_do_not_hold_the_window_shut() -> None:
    link = Link(replace(INFO, window_frames=4))
    handle = link.open("a")
    link.session.step(handle, X[0])
    link.advance()
    link.deliver(stepped(3, np.zeros((1, 1, 2), np.float32), [(0, 0, Code.SEQ_REPEATED, 9)]))
    link.session.step(handle, X[0])
    assert acks(link.advance()) == [[9]]


def test_a_conflict_leaves_the_stream_where_it_is() -> None:
    link = Link()
    handle = link.open("a")
    step = link.session.step(handle, X[:3])
    link.advance()
    y = np.zeros((3, 1, 2), np.float32)
    link.deliver(stepped(3, y, [(0, 2, Code.CONFLICT, 7)]))
    assert refusal(step).failures[0].expected_seq == 7
    assert link.session.table.next_seqs(handle).tolist() == [2]
    link.session.step(handle, X[0])
    assert acks(link.advance()) == [[2]]
