from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InvalidInput, StreamEvicted, StreamRefused
from instep_client.protocol.wire import Kind
from tests.support.fake_server import INFO, Message, evicted, reference
from tests.support.session_link import Link, X, headers, refuse
from tests.support.states import floats_of

SMALL = replace(INFO, max_message_bytes=2 * 201)
"""Room for two names."""


def sent(messages: list[Message]) -> list[tuple[Kind, bytes]]:
    """Kind and first frame of messages."""
    return [(header[0], message[1]) for header, message in zip(headers(messages), messages, strict=True)]


def test_open_and_close_are_these_bytes() -> None:
    link = Link()
    opening = link.session.open(["a", "é"], np.arange(8).reshape(2, 2, 2), single=False)
    [message] = link.advance()
    assert message == [bytes.fromhex("950202020100"), b"a\n\xc3\xa9", np.arange(8, dtype="<f4").tobytes(), b""]
    handle = link.finish(opening)
    link.session.close(handle)
    closings = "0100000000000000 ffffffffffffffff 0200000000000000 ffffffffffffffff"
    assert link.advance() == [[bytes.fromhex("93040302"), bytes.fromhex(closings)]]


def test_a_stream_starts_from_its_state_and_ends_in_the_networks() -> None:
    link = Link()
    state = np.array([[1, 2], [3, 4]], np.float32)
    handle = link.open("a", initial=state)
    step = link.session.step(handle, X[:3])
    final = link.finish(link.session.close(handle))
    outputs, expected = reference(X[:3], state)
    assert step.result().outputs.tolist() == outputs.tolist()
    assert floats_of(final, 2, 2)[0].tolist() == expected.tolist()
    assert link.rules.names == {}
    assert link.session.table.next_seqs(handle).tolist() == [3]


@pytest.mark.parametrize(
    "names",
    [[], [""], [b"a"], ["\ud800"], ["a", "b", "c", "b"]],
)
def test_bad_names_are_refused_before_anything_is_sent(names: Sequence[Any]) -> None:
    link = Link()
    with pytest.raises(InvalidInput):
        link.session.open(names, None, single=False)
    assert link.advance() == []


def test_all_of_a_group_are_opened_or_none() -> None:
    link = Link()
    taken = link.open("b")
    opening = link.session.open(["a", "b", "c"], None, single=False)
    link.run()
    with pytest.raises(StreamRefused):
        opening.result()
    assert link.rules.names == {"b": 1}
    assert link.finish(link.session.step(taken, X[0]))
    assert len(link.open("a", "c").rows) == 2


def test_large_groups_are_opened_and_closed_in_parts() -> None:
    link = Link(SMALL)
    states = np.arange(20).reshape(5, 2, 2)
    opening = link.session.open(list("abcde"), states, single=False)
    messages = link.advance()
    assert sent(messages) == [(Kind.OPEN, b"a\nb"), (Kind.OPEN, b"c\nd"), (Kind.OPEN, b"e")]
    assert b"".join(message[2] for message in messages) == states.astype("<f4").tobytes()
    handle = link.finish(opening)
    assert len(handle.rows) == 5
    closing = link.session.close(handle)
    assert [header[2] for header in headers(link.advance())] == [2, 2, 1]
    assert floats_of(link.finish(closing), 2, 2).tolist() == states.tolist()


def test_one_refused_part_undoes_the_others() -> None:
    link = Link(SMALL)
    link.open("d")
    opening = link.session.open(list("abcde"), None, single=False)
    link.advance()
    link.to_server.append(link.to_server.popleft())  # the parts may be answered in any order
    refuse(link, Code.BUSY)
    link.run()
    with pytest.raises(StreamRefused):
        opening.result()
    assert link.rules.names == {"d": 1}


@pytest.mark.parametrize("is_answered", [False, True])
def test_streams_that_nobody_waits_for_are_closed_again(is_answered: bool) -> None:
    link = Link()
    opening = link.session.open(["a"], None, single=True)
    link.advance()
    if is_answered:
        link.serve()
        link.settle_client()
    link.session.cancel(opening)
    link.run()
    assert link.rules.names == {}
    assert Kind.CLOSE in link.rules.kinds


def test_rows_are_used_again_and_start_afresh() -> None:
    link = Link()
    first = link.open("a")
    link.finish(link.session.step(first, X[:2]))
    bad = link.session.step(first, [np.nan] * 3)
    link.run()
    assert bad.error
    link.finish(link.session.close(first))
    second = link.open("b")
    assert second.rows.tolist() == first.rows.tolist()
    assert link.session.table.next_seqs(second).tolist() == [0]
    assert link.session.table.next_seqs(first).tolist() == [2]
    assert link.finish(link.session.step(second, X[0])).outputs.tolist() == reference(X[:1])[0][0].tolist()
    link.deliver(evicted([1]))  # the first one's handle
    assert link.finish(link.session.step(second, X[1]))


class TestEnded:
    def test_closing_a_stream_that_was_evicted_says_so_and_sends_nothing(self) -> None:
        link = Link()
        handle = link.open("a")
        link.deliver(evicted([1]))
        with pytest.raises(StreamEvicted):
            link.session.close(handle)
        assert link.advance() == []
        other = link.open("b")
        assert other.rows.tolist() == handle.rows.tolist()
        assert not link.finish(link.session.close(other)).any()
        assert link.rules.kinds[-1] is Kind.CLOSE

    def test_a_group_gives_the_states_of_those_that_are_left(self) -> None:
        link = Link()
        group = link.open("a", "b", "c", initial=np.ones((3, 2, 2)))
        link.rules.end([1, 2])
        link.deliver(evicted([1]))  # the message about b is still on its way
        closing = link.session.close(group)
        assert headers(link.advance())[0][:3] == [Kind.CLOSE, 3, 2]
        link.run()
        finals = floats_of(closing.result(), 4)
        assert np.isnan(finals[:2]).all()
        assert finals[2].tolist() == [1, 1, 1, 1]

    def test_a_refused_close_may_be_tried_again(self) -> None:
        link = Link()
        handle = link.open("a")
        closing = link.session.close(handle)
        link.advance()
        refuse(link, Code.SHUTTING_DOWN)
        link.run()
        with pytest.raises(StreamRefused):
            closing.result()
        assert link.finish(link.session.step(handle, X[0]))
        assert link.finish(link.session.close(handle)).shape == (1, 16)
