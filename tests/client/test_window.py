"""The window: how far a stream's frames go ahead of its outputs, and what is acknowledged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import COLUMN, Kind
from tests.support.fake_server import INFO, Message, pack, reference, stepped
from tests.support.session_link import BAD, Link, X, refusal, sizes
from tests.support.step_messages import parts


def acks(messages: list[Message]) -> list[list[int]]:
    """What each STEP acknowledges, a number a column."""
    arrays = [arrays for header, arrays in map(parts, messages) if header[0] == Kind.STEP]
    return [np.frombuffer(columns, COLUMN)["acked"].tolist() for columns, _ in arrays]


def test_a_call_that_waits_for_the_window_can_be_withdrawn() -> None:
    link = Link(replace(INFO, window_frames=4))
    handle = link.open("a")
    link.session.step(handle, X[:3])
    waiting, behind = link.session.step(handle, X[3:5]), link.session.step(handle, X[5])
    assert sizes(link.advance()) == [(2, 1), (1, 1)]
    link.session.cancel(waiting)
    assert sizes(link.advance()) == [(1, 1)]  # there is room for this one
    assert link.finish(behind)


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


def test_another_stream_is_not_held_back() -> None:
    link = Link(replace(INFO, window_frames=2))
    slow, other = link.open("a"), link.open("b")
    for x in X[:4]:
        link.session.step(slow, x)
    link.session.step(other, X[0])
    assert sum(t * n for t, n in sizes(link.advance())) == 3


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


def test_what_was_refused_is_not_acknowledged() -> None:
    link = Link()
    group = link.open("a", "b")
    x = np.ones((3, 2, 3), np.float32)
    x[1, 1] = BAD
    link.session.step(group, x)
    link.settle()
    link.session.step(group, X[:2])
    assert acks(link.advance()) == [[3, 1]]


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


def test_outputs_that_are_no_longer_kept_do_not_hold_the_window_shut() -> None:
    link = Link(replace(INFO, window_frames=4))
    handle = link.open("a")
    link.session.step(handle, X[0])
    link.advance()
    link.deliver(stepped(3, np.zeros((1, 1, 2), np.float32), [(0, 0, Code.SEQ_REPEATED, 9)]))
    link.session.step(handle, X[0])
    assert acks(link.advance()) == [[9]]


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_a_group_of_many_steps_goes_through_any_window(window: int) -> None:
    link = Link(replace(INFO, window_frames=window))
    group = link.open("a", "b", "c")
    x: Any = np.random.default_rng(0).integers(-8, 8, (23, 3, 3)).astype(np.float32)
    outputs = link.finish(link.session.step(group, x)).outputs
    for column in range(3):
        assert outputs[:, column].tolist() == reference(x[:, column])[0].tolist()


def test_a_pong_acknowledges_nothing() -> None:
    link = Link()
    handle = link.open("a")
    link.session.step(handle, X[0])
    link.advance()
    link.session.ping(0.0)
    link.advance()
    link.deliver([pack(Kind.PONG, 4)])
    link.session.step(handle, X[1])
    assert acks(link.advance()) == [[0]]
