"""STEP and STEPPED taken apart and put together; written without the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

STEP, STEPPED = 3, 67
_STEP = struct.Struct("<BBHIIIQ")
_STEPPED = struct.Struct("<BBH7I")
_ANSWERED = struct.Struct("<2Q")
_FAILURE = np.dtype([("column", "<u4"), ("rest", "V20")])


def step_header(request: int, timesteps: int, width: int, features: int, dtype: int = 1) -> bytes:
    """The 24 bytes that a STEP begins with."""
    return _STEP.pack(STEP, dtype, 0, timesteps, width, features, request)


def stepped_header(
    answered: Sequence[tuple[int, int]], timesteps: int, failed: int, times_us: Sequence[int] = (0, 0, 0)
) -> bytes:
    """Frame 0 of a STEPPED without its failures; for each request its number of columns."""
    width = sum(columns for _, columns in answered)
    header = _STEPPED.pack(STEPPED, 0, len(answered), timesteps, width, *times_us, failed, 0)
    return header + b"".join(_ANSWERED.pack(*each) for each in answered)


def parts(message: Sequence[bytes]) -> tuple[list[Any], list[bytes]]:
    """The header's values and the arrays of any message.

    Of STEP these are [kind, request, T, N, features, dtype] and [columns, x]; of STEPPED [kind, first request, T, N,
    queue_us, compute_us, send_us] and [y, failures].
    """
    first = message[0]
    if first[:1] == bytes([STEP]):
        kind, dtype, _, timesteps, width, features, request = _STEP.unpack_from(first)
        return [kind, request, timesteps, width, features, dtype], [first[_STEP.size :], *message[1:]]
    if first[:1] == bytes([STEPPED]):
        kind, _, requests, timesteps, width, *times_us, failed, _ = _STEPPED.unpack_from(first)
        request, _ = _ANSWERED.unpack_from(first, _STEPPED.size)
        failures = first[_STEPPED.size + _ANSWERED.size * requests :]
        assert len(failures) == 24 * failed
        return [kind, request, timesteps, width, *times_us], [*message[1:], failures]
    header: list[Any] = msgpack.unpackb(first)
    return header, list(message[1:])


def apart(message: Sequence[bytes]) -> list[list[bytes]]:
    """Messages of the server as it would have sent them had it answered each request by itself."""
    if message[0][:1] != bytes([STEPPED]):
        return [list(message)]
    _, (y, all_failures) = parts(message)
    _, _, requests, timesteps, width, *times_us, _, _ = _STEPPED.unpack_from(message[0])
    end = _STEPPED.size + _ANSWERED.size * requests
    outputs = np.frombuffer(y, "<f4").reshape(timesteps, width, -1)
    failures = np.frombuffer(all_failures, _FAILURE)
    messages, start = [], 0
    for request, columns in _ANSWERED.iter_unpack(message[0][_STEPPED.size : end]):
        assert columns
        own = failures[(start <= failures["column"]) & (failures["column"] < start + columns)].copy()
        own["column"] -= start
        header = stepped_header([(request, columns)], timesteps, len(own), times_us)
        messages.append([header + own.tobytes(), outputs[:, start : start + columns].tobytes()])
        start += columns
    assert start == width
    return messages
