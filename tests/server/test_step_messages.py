"""What is taken as like the message before is exactly what reading it would have found."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instep.server.burst import Step
from instep.server.clients import Client
from instep.server.refusal import Refusal
from instep.server.step_messages import StepMessages

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Code, Kind

CLIENT = Client(number=0, arrival=1, routing_id=b"", last_heard_ns=5)
FEATURES = 3
REQUESTS = st.sampled_from([0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63 - 1])


def message(request: int, timesteps: int = 1, columns: int = 1) -> list[bytes]:
    header = wire.pack_header(Kind.STEP, request, timesteps, columns, FEATURES, "f4")
    return [header, b"c" * 24 * columns, b"x" * timesteps * columns * FEATURES * 4]


def read(steps: StepMessages, frames: list[bytes]) -> Step:
    return steps.read(CLIENT, wire.unpack_header(frames), frames)


def messages(timesteps: int = 1, columns: int = 1) -> StepMessages:
    """With one of that shape as the newest."""
    steps = StepMessages(FEATURES, max_block_frames=8)
    read(steps, message(7, timesteps, columns))
    return steps


@given(REQUESTS, st.integers(1, 4), st.integers(1, 2))
def test_a_message_that_differs_in_its_request_alone_is_known(request: int, timesteps: int, columns: int) -> None:
    frames = message(request, timesteps, columns)
    known = messages(timesteps, columns).alike(CLIENT, frames)
    assert known == read(StepMessages(FEATURES, 8), frames)
    assert known is not None
    assert (known.request, known.timesteps, known.columns, known.frames) == (
        request,
        timesteps,
        columns,
        timesteps * columns,
    )
    assert (known.column, known.x, known.came_ns) == (frames[1], frames[2], 5)


@pytest.mark.parametrize(
    "frames",
    [
        message(8, timesteps=2),
        message(8, columns=2),
        message(8)[:2],
        [*message(8), b""],
        [],
        [message(8)[0], message(8)[1], b"x"],
        [message(8)[0], b"c", message(8)[2]],
        [wire.pack_header(Kind.OPEN, 8, 1, 1, FEATURES, "f4"), *message(8)[1:]],
        [msgpack.packb([int(Kind.STEP), 8, 1, 1, FEATURES, "f8"]), *message(8)[1:]],
        [msgpack.packb([int(Kind.STEP), 8, 1.0, 1, FEATURES, "f4"]), *message(8)[1:]],
        [msgpack.packb([int(Kind.STEP), 8, True, 1, FEATURES, "f4"]), *message(8)[1:]],
        [message(8)[0] + b"\x01", *message(8)[1:]],
    ],
)
def test_any_other_difference_is_seen(frames: list[bytes]) -> None:
    assert messages().alike(CLIENT, frames) is None


@given(st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.none(), st.binary(max_size=9)))
def test_what_is_no_request_is_never_taken_for_one(request: object) -> None:
    frames = [msgpack.packb([int(Kind.STEP), request, 1, 1, FEATURES, "f4"]), *message(0)[1:]]
    known = messages().alike(CLIENT, frames)
    try:
        expected = read(StepMessages(FEATURES, 8), frames)
    except MalformedMessage:
        assert known is None
    else:
        assert known == expected


@given(st.binary(max_size=12))
def test_any_bytes_as_a_request_are_read_as_msgpack_reads_them(middle: bytes) -> None:
    header = message(0)[0]
    frames = [header[:2] + middle + header[3:], *message(0)[1:]]
    known = messages().alike(CLIENT, frames)
    if known is not None:
        assert known == read(StepMessages(FEATURES, 8), frames)


def test_before_the_first_message_none_is_known() -> None:
    steps = StepMessages(FEATURES, 8)
    assert steps.alike(CLIENT, message(1)) is None
    assert steps.alike(CLIENT, [b"", b"", b""]) is None


def test_a_message_that_is_refused_makes_none_like_it_known() -> None:
    steps = messages()
    with pytest.raises(Refusal) as refused:
        read(steps, message(8, timesteps=9))
    assert refused.value.code == Code.TOO_LARGE
    assert steps.alike(CLIENT, message(9, timesteps=9)) is None
    assert steps.alike(CLIENT, message(9)) is not None


def test_one_that_is_written_in_another_way_makes_those_of_the_usual_one_known() -> None:
    steps = StepMessages(FEATURES, 8)
    usual = message(8)
    longer = usual[0][:3] + b"\xcc\x01" + usual[0][4:]  # timesteps in two bytes
    assert read(steps, [longer, *usual[1:]]).timesteps == 1
    assert steps.alike(CLIENT, usual) is not None
    assert steps.alike(CLIENT, [longer, *usual[1:]]) is None
