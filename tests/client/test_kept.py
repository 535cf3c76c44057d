"""Pipelined sends whose outputs are taken later, and calls that nobody waits for any more."""

from __future__ import annotations

import gc
import weakref

import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ClientClosed, InstepError
from tests.support.fake_server import reference
from tests.support.session_link import BAD, Link, X, limited, refusal


def test_outputs_are_taken_in_the_order_of_the_sends_each_at_its_place() -> None:
    link = Link()
    handle = link.open("a")
    calls = [link.session.step(handle, x, keep=True) for x in (X[0], BAD, X[:2])]
    assert link.session.take(handle) is None
    assert not link.session.outputs_end(handle)
    link.advance()
    assert all(call.sent for call in calls)
    link.run()
    assert [link.session.take(handle) for _ in range(4)] == [*calls, None]
    assert refusal(calls[1]).code is Code.NOT_FINITE
    link.session.finish(handle)
    assert link.session.outputs_end(handle)
    for keep in (True, False):
        with pytest.raises(ClientClosed):
            link.session.step(handle, X[0], keep=keep)


def test_unread_outputs_hold_the_stream_back_until_they_are_taken() -> None:
    link = limited(credit=4)
    handle, other = link.open("a"), link.open("b")
    kept = [link.session.step(handle, x, keep=True) for x in X[:5]]
    behind = link.session.step(handle, X[5])
    link.run()
    assert [call.sent for call in kept] == [True, True, True, True, False]
    assert link.finish(link.session.step(other, X[0]))
    assert link.session.take(handle) is kept[0]
    link.run()
    assert kept[4].done
    assert behind.done


@pytest.mark.parametrize("came_before", [False, True])
def test_nobody_reading_is_an_error_after_the_timeout(came_before: bool) -> None:
    link = limited(credit=1)
    handle = link.open("a")
    link.session.step(handle, X[0], keep=True)
    if came_before:
        link.run()
    held_back = link.session.step(handle, X[1], keep=True)
    link.run()
    assert link.session.deadline() == link.now + 10.0
    link.advance(9.9)
    assert not held_back.done
    link.advance(0.1)
    with pytest.raises(InstepError):
        held_back.result()
    assert link.session.take(handle)
    assert link.finish(link.session.step(handle, X[1], keep=True))


def test_what_was_not_sent_is_not_sent_and_the_rest_is_dropped_when_it_comes() -> None:
    link = limited(credit=1)
    handle = link.open("a")
    sent, waiting, last = (link.session.step(handle, x) for x in X[:3])
    link.advance()
    for call in (sent, waiting):
        link.session.cancel(call)
    link.run()
    assert last.result().outputs.tolist() == reference(X[[0, 2]])[0][1].tolist()
    assert link.session.table.next_seqs(handle).tolist() == [2]


def test_outputs_that_nobody_takes_are_kept_for_as_long_as_the_handle_and_no_longer() -> None:
    link = Link()
    handle = link.open("a")
    kept = link.session.step(handle, X[0], keep=True)
    link.finish(link.session.close(handle))
    assert link.session.take(handle) is kept
    handle = link.open("a")
    link.session.step(handle, X[0], keep=True)
    link.finish(link.session.close(handle))
    link.session.outbox.take_woken()
    rows = weakref.ref(handle.rows)
    del handle
    gc.collect()
    assert rows() is None
