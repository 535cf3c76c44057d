"""STEPPED that answers several requests, as one message for each; written without the code under test."""

from __future__ import annotations

from collections.abc import Sequence

import msgpack
import numpy as np

STEPPED = 67
FAILURE = np.dtype([("column", "<u4"), ("timestep", "<u4"), ("code", "<u4"), ("rest", "V12")])


def apart(message: Sequence[bytes]) -> list[list[bytes]]:
    """Messages of the server as it would have sent them had it answered each request by itself."""
    header = msgpack.unpackb(message[0])
    if header[0] != STEPPED or not header[8]:
        return [list(message)]
    _, first, timesteps, columns, *times, sentences, also = header
    y = np.frombuffer(message[1], "<f4").reshape(timesteps, columns, -1)
    failures = np.frombuffer(message[2], FAILURE)
    starts = [0, *also[1::2], columns]
    messages = []
    for request, start, end in zip([first, *also[::2]], starts, starts[1:], strict=False):
        assert start < end
        own = failures[(start <= failures["column"]) & (failures["column"] < end)].copy()
        own["column"] -= start
        said = [sentence for sentence in sentences if sentence[0] in own["code"]]
        packed = msgpack.packb([STEPPED, request, timesteps, end - start, *times, said, []])
        messages.append([packed, y[:, start:end].tobytes(), own.tobytes()])
    assert len(messages) == 1 + len(also) / 2
    return messages
