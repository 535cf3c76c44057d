"""The rules of reading messages, broken one by one: the tests of the wire notice each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from instep_client import replies
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Frame, Header, Kind
from tests.client import test_replies, test_step_messages, test_wire
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


def any_bytes_are_a_ping(original: Any, frames: Sequence[Frame], *rest: Any) -> Header:
    try:
        header: Header = original(frames, *rest)
    except MalformedMessage:
        header = Header(Kind.PING, 0, ())
    return header


def failures_of_the_next(original: Any, frames: Sequence[Frame]) -> list[replies.Stepped]:
    answers: list[replies.Stepped] = original(frames)
    following = [answer.failures for answer in (*answers[1:], answers[0])]
    return [answer._replace(failures=failures) for answer, failures in zip(answers, following, strict=True)]


def any_bytes_are_a_step(original: Any, frames: Sequence[Frame]) -> tuple[int, int, int, int, int]:
    try:
        read: tuple[int, int, int, int, int] = original(frames)
    except MalformedMessage:
        read = 1, 1, 1, 1, wire.DTYPE_F32
    return read


def no_failures(original: Any, *arguments: Any) -> list[replies.ColumnError]:
    try:
        failures: list[replies.ColumnError] = original(*arguments)
    except MalformedMessage:
        failures = []
    return failures


RULES = (
    BrokenRule(
        "bytes that are not a message are taken for a PING",
        replaces=wire.unpack_header,
        variant=any_bytes_are_a_ping,
        found_by=[partial(test_wire.test_what_is_no_message_is_refused, frames=[b"\x05"])],
    ),
    BrokenRule(
        "bytes that are not a STEP are taken for one",
        replaces=wire.unpack_step,
        variant=any_bytes_are_a_step,
        found_by=[
            partial(
                test_step_messages.test_what_is_not_a_step_is_refused,
                frames=[test_step_messages.STEP[:-1], b""],
            )
        ],
    ),
    BrokenRule(
        "an array is read from a frame of another size",
        replaces=wire.check_size,
        variant=lambda original, *arguments: None,
        found_by=[test_wire.test_an_array_frame_is_read_without_a_copy_and_only_at_its_exact_size],
    ),
    BrokenRule(
        "a count beyond its bounds is believed",
        replaces=wire.count_field,
        variant=lambda original, value, *bounds, **named: value,
        found_by=[partial(test_wire.test_a_count_is_an_integer_within_its_bounds, value=11)],
    ),
    BrokenRule(
        "a frame may hold another number of names than its header says",
        replaces=wire.unpack_names,
        variant=lambda original, frame, count: bytes(frame).decode().split("\n"),
        found_by=[partial(test_wire.test_names_that_are_not_lines_are_refused, frame=b"a\nb", count=1)],
    ),
    BrokenRule(
        "a stream may have a name with a line break",
        replaces=wire.name_is_good,
        variant=lambda original, name: bool(name),
        found_by=[partial(test_wire.test_a_good_name_is_printable_and_short, name="a\nb", is_good=False)],
    ),
    BrokenRule(
        "a refusal is reported to the request next to its own",
        replaces=replies.stepped,
        variant=failures_of_the_next,
        found_by=[test_replies.test_a_stepped_of_several_requests_falls_apart_into_one_of_each],
    ),
    BrokenRule(
        "failures that cannot be read count as none",
        replaces=replies._failures,
        variant=no_failures,
        found_by=[
            partial(
                test_replies.test_failures_and_sentences_that_contradict_the_message_are_malformed,
                entries=bytes(23),
                sentences=[],
            )
        ],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
