"""Answers to several STEPs that come in one message."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from instep_client.connection import State
from instep_client.frames import StepCall
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import FAILURE
from tests.support.fake_server import F32, Message, reference
from tests.support.session_link import BAD, Link, X, refusal, sizes
from tests.support.step_messages import parts, stepped_header


def joined(answers: Sequence[Message], requests: Sequence[int] = ()) -> Message:
    """STEPPEDs of as many timesteps as one; with other requests than theirs, where given."""
    read = [parts(answer) for answer in answers]
    headers = [header for header, _ in read]
    outputs = [np.frombuffer(y, "<f4").reshape(*header[2:4], -1) for header, (y, _) in read]
    starts = np.cumsum([0, *(header[3] for header in headers)]).tolist()
    failures = [np.frombuffer(entries, FAILURE).copy() for _, (_, entries) in read]
    for entries, start in zip(failures, starts, strict=False):
        entries["column"] += start
    every = np.concatenate(failures)
    requests = requests or [header[1] for header in headers]
    answered = [(request, header[3]) for request, header in zip(requests, headers, strict=True)]
    header = stepped_header(answered, headers[0][2], len(every), headers[0][4:7])
    return [header + every.tobytes(), np.concatenate(outputs, axis=1).tobytes()]


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
    number = parts(one)[0][1]
    link.deliver(joined([one, other], requests=[number, number if again else 1_000_000]))
    assert first.result().outputs.tolist() == reference(X[:1])[0][0].tolist()
    assert link.session.state is State.ENDED
    for call in (second, third):
        assert isinstance(call.error, MalformedMessage)
