"""Messages the server sends, built from arrays. Pure: values in, frames out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from instep.core.typing import F32, I32, I64, U64
from instep.server.answers import Answer
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind, Message

_OBJECTS_BYTES = 256


def failures(codes: I32, timesteps: I64 | None = None, expected_seq: I64 | None = None) -> wire.FailureArray:
    """One FAILURE entry for each column whose code is not 0."""
    if not np.count_nonzero(codes):
        return wire.NO_FAILURES
    columns = np.flatnonzero(codes)
    entries = np.zeros(len(columns), wire.FAILURE)
    entries["column"] = columns
    entries["code"] = codes[columns]
    if timesteps is not None:
        entries["timestep"] = timesteps[columns]
    if expected_seq is not None:
        entries["expected_seq"] = expected_seq[columns]
    return entries


def _sentences(entries: wire.FailureArray) -> list[tuple[int, str]]:
    return [(code, wire.SENTENCES[Code(code)]) for code in np.unique(entries["code"]).tolist()]


def welcome(request: int, info: wire.ServerInfo) -> Message:
    """WELCOME: the fields of `ServerInfo` in order."""
    fields = [getattr(info, name) for name in wire.ServerInfo.__slots__]
    return [wire.pack_header(Kind.WELCOME, request, *fields)]


def opened(request: int, grants: wire.GrantArray, codes: I32, durability: str) -> Message:
    """OPENED: grants [N], handle 0 where refused."""
    return _granted(Kind.OPENED, request, grants, failures(codes), durability)


def resumed(request: int, grants: wire.GrantArray, codes: I32, expected_seq: I64, durability: str) -> Message:
    """RESUMED: grants [N], handle 0 where refused."""
    return _granted(Kind.RESUMED, request, grants, failures(codes, None, expected_seq), durability)


def _granted(kind: Kind, request: int, grants: wire.GrantArray, refused: wire.FailureArray, durability: str) -> Message:
    header = wire.pack_header(kind, request, len(grants), durability, _sentences(refused))
    return [header, grants.tobytes(), refused.tobytes()]


def state_read(request: int, seqs: I64, states: F32, codes: I32) -> Message:
    """STATE_READ: next seqs int64 [N] and states float32 [N, layers, size], NaN where refused."""
    refused = failures(codes)
    header = wire.pack_header(Kind.STATE_READ, request, len(seqs), _sentences(refused))
    return [header, seqs.tobytes(), states.tobytes(), refused.tobytes()]


def changed(request: int, codes: I32) -> Message:
    """CHANGED: what was not done, and why."""
    refused = failures(codes)
    return [wire.pack_header(Kind.CHANGED, request, len(codes), _sentences(refused)), refused.tobytes()]


def stepped(requests: Sequence[int], columns: Sequence[int], answer: Answer, times_ns: tuple[int, int, int]) -> Message:
    """STEPPED: the answer to the messages of these requests, of so many columns each, beside each other.

    `times_ns` is how long they waited, were computed, and took to be sent.
    """
    refused = failures(answer.codes, answer.lengths, answer.expected_seq)
    also: list[int] = []
    if len(requests) > 1:
        for request, first in zip(requests[1:], accumulate(columns), strict=False):
            also += request, first
    timesteps, width, _ = answer.y.shape
    queue_ns, compute_ns, send_ns = times_ns
    times_us = queue_ns // 1000, compute_ns // 1000, send_ns // 1000
    sentences = _sentences(refused) if len(refused) else ()
    header = wire.pack_header(Kind.STEPPED, requests[0], timesteps, width, *times_us, sentences, also)
    return [header, answer.y.data.cast("B"), refused.tobytes()]


def closed(request: int, states: F32, codes: I32) -> Message:
    """CLOSED: final states float32 [N, layers, size], NaN where refused."""
    refused = failures(codes)
    header = wire.pack_header(Kind.CLOSED, request, len(states), _sentences(refused))
    return [header, states.tobytes(), refused.tobytes()]


def pong(request: int) -> Message:
    """PONG: the answer to a PING."""
    return [wire.pack_header(Kind.PONG, request)]


def ping(number: int) -> Message:
    """PING: the server asks whether the connection is there and reads; a PONG of the same number answers."""
    return [wire.pack_header(Kind.PING, number)]


def statistics(request: int, values: dict[str, float]) -> Message:
    """STATISTICS: [[name, value], …]."""
    return [wire.pack_header(Kind.STATISTICS, request, list(values.items()))]


def evicted(code: Code, handles: U64) -> Message:
    """EVICTED: the server ended these streams."""
    return [wire.pack_header(Kind.EVICTED, 0, len(handles), int(code), wire.SENTENCES[code]), handles.tobytes()]


def error(request: int, code: Code, sentence: str, retry_after_us: int = 0) -> Message:
    """ERROR: the whole message was refused and nothing of it applied."""
    return [wire.pack_header(Kind.ERROR, request, int(code), sentence[:900], retry_after_us)]


def goodbye(sentence: str) -> Message:
    """GOODBYE: the server ends; unless the end was forced or a failure, what it had admitted is answered."""
    return [wire.pack_header(Kind.GOODBYE, 0, sentence[:900])]


def size_bytes(message: Message) -> int:
    """About what a message takes in memory: its frames, and the objects around them."""
    return _OBJECTS_BYTES + sum(map(len, message))
