"""The bytes of STEP and STEPPED, written out by hand, and what happens to bytes that are not so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import COLUMN, FAILURE

STEP = bytes.fromhex(
    "03 01 0000"  # kind 3, dtype 1, reserved
    "02000000 03000000 28000000"  # T 2, N 3, features 40
    "2c01000000000000"  # request 300
    "0807060504030201 ff00000000000000 0300000000000000"  # handle, seq 255, acked 3
    "0200000001000000 0000000000010000 0000000000000000"  # handle, seq 2^40, acked 0
    "0300000001000000 0000000000000000 0000000000000000"
)
STEPPED = bytes.fromhex(
    "43 00 0200"  # kind 67, reserved, 2 requests
    "01000000 03000000"  # T 1, N 3
    "64000000 c8000000 ffffffff"  # queue_us 100, compute_us 200, send_us 2^32 - 1
    "01000000 00000000"  # 1 failure, reserved
    "2c01000000000000 0200000000000000"  # request 300, 2 columns
    "0000000000010000 0100000000000000"  # request 2^40, 1 column
    "02000000 00000000 65000000 00000000 0807060504030201"  # column 2, timestep 0, code 101, reserved, expected seq
)
ANSWERED = [(300, 2), (2**40, 1)]
Y = np.arange(6, dtype="<f4").tobytes()
"""[1, 3, 2]."""


def changed(message: bytes, at: int, new: str) -> bytes:
    """Other bytes from some place on."""
    put = bytes.fromhex(new)
    return message[:at] + put + message[at + len(put) :]


def test_a_step_is_these_bytes() -> None:
    columns = np.array(
        [(0x0102030405060708, 255, 3), (0x1_0000_0002, 2**40, 0), (0x1_0000_0003, 0, 0)], COLUMN
    ).tobytes()
    assert wire.pack_step(300, 2, 40, columns) == STEP
    assert wire.unpack_step([STEP, b"x is not looked at"]) == (300, 2, 3, 40, 1)
    assert STEP[wire.STEP_HEADER.size :] == columns


def test_a_stepped_is_these_bytes() -> None:
    answered = np.array(ANSWERED, "<u8").tobytes()
    failures = np.array([(2, 0, 101, 0, 0x0102030405060708)], FAILURE)
    for send_us in (2**32 - 1, 2**32, 2**70):  # what does not fit is sent as the most that does
        assert wire.pack_stepped(answered, 1, 3, (100, 200, send_us), failures.tobytes()) == STEPPED
    read = wire.unpack_stepped([memoryview(STEPPED), memoryview(Y)])
    assert (read.answered, read.times_us) == (ANSWERED, (100, 200, 2**32 - 1))
    assert read.y.tolist() == [[[0, 1], [2, 3], [4, 5]]]
    assert not read.y.flags.writeable
    assert read.failures.tolist() == failures.tolist()


@pytest.mark.parametrize(
    "frames",
    [
        [STEP],
        [STEP[:23], b""],
        [STEP + b"\0", b""],
        [changed(STEP, 2, "01"), b""],
        [changed(STEP[:24], 8, "00000000"), b""],
    ],
)
def test_what_is_not_a_step_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        wire.unpack_step(frames)


def test_a_refusal_names_the_request_where_it_can_be_read() -> None:
    assert wire.request_of_step(STEP) == wire.request_of_step(STEP[:24]) == 300
    assert wire.request_of_step(changed(STEP, 16, "ffffffffffffff7f")) == 2**63 - 1
    assert wire.request_of_step(changed(STEP, 16, "0000000000000080")) == 0
    assert wire.request_of_step(STEP[:23]) == 0


@pytest.mark.parametrize(
    "frames",
    [
        [STEPPED],
        [changed(STEPPED, 0, "42"), Y],
        [changed(STEPPED, 2, "0000"), Y],
        [changed(STEPPED, 24, "00000000"), Y],
        [changed(STEPPED, 40, "0300000000000000"), Y],
        [changed(STEPPED, 4, "ffffffff"), Y],
    ],
)
def test_what_is_not_a_stepped_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        wire.unpack_stepped(frames)


@settings(deadline=None)
@given(
    st.sampled_from([STEP, STEPPED]),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4),
    st.integers(-30, 30),
    st.integers(0, 40),
)
def test_other_bytes_are_a_message_or_malformed(
    message: bytes, edits: list[tuple[int, int]], longer: int, floats: int
) -> None:
    header = bytearray(message[: len(message) + longer] if longer < 0 else message + bytes(longer))
    for at, value in edits:
        header[at % len(header)] = value
    frames = [bytes(header), bytes(floats)]
    try:
        request, timesteps, width, _, _ = wire.unpack_step(frames)
    except MalformedMessage:
        pass
    else:
        assert (len(header), timesteps > 0, request < 2**63) == (24 * (width + 1), True, True)
    try:
        read = wire.unpack_stepped(frames)
    except MalformedMessage:
        pass
    else:
        assert sum(columns for _, columns in read.answered) == read.y.shape[1]
        assert len(header) == 32 + 16 * len(read.answered) + 24 * len(read.failures)
