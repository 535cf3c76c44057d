"""Answers to several STEPs that come in one message."""

from __future__ import annotations

from collections.abc import Sequence

import msgpack
import numpy as np
import pytest

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import ConnectionFailed, MalformedMessage
from instep_client.protocol.wire import FAILURE
from instep_client.session import State
from instep_client.steps import StepCall
from tests.support.fake_server import F32, Message, reference
from tests.support.session_link import BAD, Link, X, refusal, sizes


def joined(answers: Sequence[Message]) -> Message:
    """STEPPEDs of as many timesteps as one."""
    read = [msgpack.unpackb(answer[0]) for answer in answers]
    outputs = [
        np.frombuffer(answer[1], "<f4").reshape(*header[2:4], -1) for header, answer in zip(read, answers, strict=True)
    ]
    starts = np.cumsum([0, *(header[3] for header in read)]).tolist()
    failures = [np.frombuffer(answer[2], FAILURE).copy() for answer in answers]
    for entries, start in zip(failures, starts, strict=False):
        entries["column"] += start
    every = np.concatenate(failures)
    said = [[code, SENTENCES[Code(code)]] for code in np.unique(every["code"]).tolist()]
    also = [number for header, start in zip(read[1:], starts[1:], strict=False) for number in (header[1], start)]
    header = [*read[0][:3], starts[-1], *read[0][4:7], said, also]
    return [msgpack.packb(header), np.concatenate(outputs, axis=1).tobytes(), every.tobytes()]


def asked(link: Link, *frames: F32) -> list[StepCall]:
    """A STEP of its own for a frame of each of as many streams, and an answer to each on its way."""
    handles = [link.open(f"s{number}") for number in range(len(frames))]
    calls = []
    for handle, frame in zip(handles, frames, strict=True):
        calls.append(link.session.step(handle, frame))
        assert sizes(link.advance()) == [(1, 1)]
    link.serve()
    return calls


def answers(link: Link) -> list[Message]:
    """Those on their way, taken out."""
    taken = list(link.to_client)
    link.to_client.clear()
    return taken


def test_each_call_gets_its_own_outputs() -> None:
    link = Link()
    calls = asked(link, X[0], X[1], X[2])
    link.deliver(joined(answers(link)))
    for number, call in enumerate(calls):
        assert call.result().outputs.tolist() == reference(X[number : number + 1])[0][0].tolist()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_refused_frame_fails_its_own_call_only(bad: int) -> None:
    link = Link()
    calls = asked(link, *(BAD if number == bad else X[number] for number in range(3)))
    link.deliver(joined(answers(link)))
    assert refusal(calls[bad]).code is Code.NOT_FINITE
    for number in {0, 1, 2} - {bad}:
        assert calls[number].result().outputs.tolist() == reference(X[number : number + 1])[0][0].tolist()


@pytest.mark.parametrize("again", [0, 1])
def test_a_request_that_nobody_has_or_that_was_answered_ends_the_session(again: int) -> None:
    link = Link()
    first, second, third = asked(link, X[0], X[1], X[2])
    one, other, _ = answers(link)
    header = msgpack.unpackb(other[0])
    header[1] = msgpack.unpackb(one[0])[1] if again else 1_000_000
    link.deliver(joined([one, [msgpack.packb(header), *other[1:]]]))
    assert first.result().outputs.tolist() == reference(X[:1])[0][0].tolist()
    assert link.session.state is State.ENDED
    for call in (second, third):
        assert isinstance(call.error, MalformedMessage)


def test_an_answer_of_other_columns_than_asked_ends_the_session() -> None:
    link = Link()
    calls = asked(link, X[0], X[1], X[2])
    message = joined(answers(link))
    header = msgpack.unpackb(message[0])
    header[-1] = header[-1][:2]  # as if the second had asked for two columns
    link.deliver([msgpack.packb(header), *message[1:]])
    assert calls[0].done
    assert isinstance(calls[1].error, MalformedMessage)
    assert isinstance(calls[2].error, MalformedMessage)


def test_answers_of_a_connection_that_was_given_up_are_no_answers() -> None:
    link = Link(timeout_s=4.0)
    calls = asked(link, X[0], X[1])
    message = joined(answers(link))
    link.advance(2.0)
    link.advance(2.0)  # silence for too long
    link.deliver(message)
    for call in calls:
        assert isinstance(call.error, ConnectionFailed)
