"""STEP and STEPPED, the two messages that carry frames of streams: binary headers of fixed size, then records.

    STEP     frame 0: header (24 bytes), COLUMN [N]                    frame 1: x float32 [T, N, features] STEPPED
    frame 0: header (32 bytes), ANSWERED [M], FAILURE [F]     frame 1: y float32 [T, N, outputs]

The first byte is the kind. Every other message begins with a msgpack array, whose first byte is at least 0x90.

This module is pure: bytes in, values out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import (
    COLUMN_BYTES,
    F32,
    FAILURE,
    MAX_BLOCK_STREAMS,
    NO_FAILURES,
    FailureArray,
    Frame,
    Kind,
)

STEP: Final = int(Kind.STEP)
STEPPED: Final = int(Kind.STEPPED)
DTYPE_F32: Final = 1
"""The only dtype of a STEP."""

MAX_REQUESTS: Final = 128
"""The most requests that one STEPPED answers."""

STEP_HEADER: Final = struct.Struct("<BBHIIIQ")
"""Kind, dtype, reserved (0), T, N, features, request."""

STEPPED_HEADER: Final = struct.Struct("<BBH7I")
"""Kind, reserved (0), M, T, N, queue_us, compute_us, send_us, F, reserved (0)."""

ANSWERED: Final = np.dtype([("request", "<u8"), ("columns", "<u8")])
"""One request that a STEPPED answers, and the number of its columns (16 bytes)."""

_ANSWERED: Final = struct.Struct("<2Q")
_F4: Final = np.dtype("<f4")
_HEADER_BYTES: Final = STEP_HEADER.size
_LEAST_STEP_BYTES: Final = _HEADER_BYTES + COLUMN_BYTES
_REQUESTS: Final = 2**63
_MOST_US: Final = 2**32 - 1


class SteppedMessage(NamedTuple):
    """A STEPPED, its sizes checked."""

    answered: list[tuple[int, int]]
    """Request and number of columns, in the order of the columns."""
    times_us: tuple[int, int, int]
    """Queue, compute and send."""
    y: F32
    """float32 [T, N, outputs], read-only, NaN where a frame was not applied."""
    failures: FailureArray
    """FAILURE [F]."""


def pack_step(request: int, timesteps: int, features: int, columns: Frame) -> bytes:
    """Frame 0 of a STEP with these columns, COLUMN [N]; frame 1 is x, float32 [T, N, features]."""
    width = len(columns) // COLUMN_BYTES
    return STEP_HEADER.pack(STEP, DTYPE_F32, 0, timesteps, width, features, request) + columns


def unpack_step(frames: Sequence[Frame]) -> tuple[int, int, int, int, int]:
    """Check and read frame 0 of a STEP. The caller checks the size of x.

    Returns:
        request, T, N, features and dtype; the columns follow after `STEP_HEADER.size` bytes.

    Raises:
        MalformedMessage: naming what is wrong.
    """
    header = frames[0]
    size = len(header)
    if len(frames) == 2 and size >= _LEAST_STEP_BYTES:
        kind, dtype, reserved, timesteps, width, features, request = STEP_HEADER.unpack_from(header)
        if (
            size == _HEADER_BYTES + COLUMN_BYTES * width
            and width <= MAX_BLOCK_STREAMS
            and timesteps
            and request < _REQUESTS
            and kind == STEP
            and not reserved
        ):
            return request, timesteps, width, features, dtype
    raise _malformed_step(frames)


def _malformed_step(frames: Sequence[Frame]) -> MalformedMessage:
    header = frames[0]
    if len(frames) != 2:
        return MalformedMessage(f"a STEP message has 2 frames, this one {len(frames)}")
    if len(header) < _HEADER_BYTES:
        return MalformedMessage(f"a STEP header is {_HEADER_BYTES} bytes, this frame {len(header)}")
    kind, _, reserved, timesteps, width, _, request = STEP_HEADER.unpack_from(header)
    if kind != STEP:
        return MalformedMessage(f"a STEP begins with {STEP}, not {kind}")
    if reserved:
        return MalformedMessage("the reserved bytes of the header must be 0")
    if request >= _REQUESTS:
        return MalformedMessage("the request number must be an integer from 0 to 2^63 - 1")
    if not timesteps:
        return MalformedMessage("T must be at least 1")
    if not 1 <= width <= MAX_BLOCK_STREAMS:
        return MalformedMessage(f"N must be from 1 to {MAX_BLOCK_STREAMS}")
    columns = len(header) - _HEADER_BYTES
    return MalformedMessage(f"columns must be {COLUMN_BYTES * width} bytes for N = {width}, they are {columns}")


def request_of_step(header: Frame) -> int:
    """The request number of a STEP that is refused; 0 where it cannot be read."""
    if len(header) < _HEADER_BYTES:
        return 0
    request: int = STEP_HEADER.unpack_from(header)[-1]
    return request if request < _REQUESTS else 0


def pack_stepped(
    answered: bytes, timesteps: int, width: int, times_us: tuple[int, int, int], failures: bytes = b""
) -> bytes:
    """Frame 0 of a STEPPED; frame 1 is y, float32 [T, N, outputs].

    Args:
        answered: ANSWERED [M].
        timesteps: T.
        width: N, the columns of all requests.
        times_us: queue, compute and send, at most 2^32 - 1 each.
        failures: FAILURE [F].
    """
    requests, failed = len(answered) // ANSWERED.itemsize, len(failures) // FAILURE.itemsize
    queue_us, compute_us, send_us = times_us
    if queue_us > _MOST_US or compute_us > _MOST_US or send_us > _MOST_US:
        queue_us, compute_us, send_us = min(queue_us, _MOST_US), min(compute_us, _MOST_US), min(send_us, _MOST_US)
    header = STEPPED_HEADER.pack(STEPPED, 0, requests, timesteps, width, queue_us, compute_us, send_us, failed, 0)
    return header + answered + failures


def unpack_stepped(frames: Sequence[Frame]) -> SteppedMessage:
    """Check and read a STEPPED, except the contents of its failures.

    Raises:
        MalformedMessage: naming what is wrong.
    """
    if len(frames) != 2:
        raise MalformedMessage(f"a STEPPED message has 2 frames, this one {len(frames)}")
    header, floats = frames
    if len(header) < STEPPED_HEADER.size:
        raise MalformedMessage(f"a STEPPED header is {STEPPED_HEADER.size} bytes, this frame {len(header)}")
    kind, first, requests, timesteps, width, queue_us, compute_us, send_us, failed, second = STEPPED_HEADER.unpack_from(
        header
    )
    if kind != STEPPED or first or second:
        raise MalformedMessage(f"a STEPPED begins with {STEPPED}, and its reserved bytes are 0")
    if not 1 <= requests <= MAX_REQUESTS:
        raise MalformedMessage(f"a STEPPED answers 1 to {MAX_REQUESTS} requests, not {requests}")
    failures_at = STEPPED_HEADER.size + requests * ANSWERED.itemsize
    if len(header) != failures_at + failed * FAILURE.itemsize:
        raise MalformedMessage("the first frame has another number of bytes than its header says")
    answered = list(_ANSWERED.iter_unpack(header[STEPPED_HEADER.size : failures_at]))
    widths = [columns for _, columns in answered]
    if not timesteps or 0 in widths or sum(widths) != width:
        raise MalformedMessage("T and each request's columns must be at least 1, and N the sum of the columns")
    outputs, rest = divmod(len(floats), 4 * timesteps * width)
    if rest or not outputs:
        raise MalformedMessage("y has another number of bytes than the header says")
    y = np.frombuffer(floats, _F4).reshape(timesteps, width, outputs)
    failures: FailureArray = np.frombuffer(header, FAILURE, failed, failures_at) if failed else NO_FAILURES
    return SteppedMessage(answered, (queue_us, compute_us, send_us), y, failures)
