"""What the server's messages say, checked field by field. Every function raises MalformedMessage, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.state_spec import U8, InvalidStateSpec, StateSpec
from instep_client.protocol.wire import F32, U64, Code, Frame, GrantArray, Header, ServerInfo

_MOST: Final = 2**63 - 1
_CODES: Final = {int(code): code for code in Code}


class ColumnError(NamedTuple):
    """One failure entry, its code's sentence beside it."""

    column: int
    timestep: int
    code: Code
    sentence: str
    expected_seq: int


class Stepped(NamedTuple):
    """STEPPED: read-only outputs [T, N, outputs], what failed, and (queue_us, compute_us, send_us)."""

    outputs: F32
    failures: list[ColumnError]
    times: tuple[int, int, int]


class ErrorReply(NamedTuple):
    """ERROR."""

    code: Code
    sentence: str
    retry_after_s: float


def welcome(header: Header) -> ServerInfo:
    """What the server says of itself."""
    fields = header.fields
    values: list[Any] = []
    for (name, kind), value in zip(ServerInfo.__annotations__.items(), fields, strict=True):
        if name == "buckets":
            if type(value) is not tuple:
                raise MalformedMessage("buckets must be an array")
            values.append(tuple(wire.count_field(bucket, "a bucket", _MOST) for bucket in value))
        elif name == "state":
            try:
                values.append(StateSpec.decode(value))
            except InvalidStateSpec as error:
                raise MalformedMessage(f"WELCOME describes a state that cannot be: {error}") from None
        elif kind == "int":
            values.append(wire.count_field(value, name, _MOST))
        elif kind == "float":
            values.append(_number(value, name))
        else:
            values.append(_text(value, name))
    return ServerInfo(*values)


def granted(header: Header, frames: Sequence[Frame], count: int) -> tuple[GrantArray, list[ColumnError]]:
    """OPENED or RESUMED: grants [count], handle 0 where refused, and what was refused."""
    n, durability, sentences = header.fields
    _count(n, count)
    _text(durability, "durability")
    grants: GrantArray = wire.array_frame(frames[1], wire.GRANT, (count,), "grants")
    failures = _failures(frames[2], sentences, count, 1)
    if {failure.column for failure in failures} != set(np.flatnonzero(grants["handle"] == 0).tolist()):
        raise MalformedMessage("the refused streams are not those without a handle")
    return grants, failures


def apart(header: Header, frames: Sequence[Frame]) -> list[tuple[Header, Sequence[Frame]]]:
    """STEPPED as messages of one request each."""
    t, n, *times_and_sentences, also = header.fields
    if also == ():
        return [(header, frames)]
    steps, columns = wire.count_field(t, "T", _MOST), wire.count_field(n, "N", _MOST)
    if type(also) is not tuple or len(also) % 2 or len(also) > 2 * wire.MAX_ALSO:
        raise MalformedMessage(f"also must be an array of at most {wire.MAX_ALSO} requests and first columns")
    requests = [header.request, *(wire.count_field(request, "a request", _MOST) for request in also[::2])]
    bounds = [0, *(wire.count_field(column, "a first column", columns - 1) for column in also[1::2]), columns]
    if any(start >= end for start, end in pairwise(bounds)):
        raise MalformedMessage("the first columns of also must rise")
    outputs, rest = divmod(len(frames[1]), 4 * steps * columns)
    if rest or not outputs or len(frames[2]) % wire.FAILURE.itemsize:
        raise MalformedMessage("y or the failures have another number of bytes than the header says")
    y = np.frombuffer(frames[1], "<f4").reshape(steps, columns, outputs)
    failures = np.frombuffer(frames[2], wire.FAILURE)
    if np.any(failures["column"] >= columns):
        raise MalformedMessage("a failure names a frame outside the block")
    answers: list[tuple[Header, Sequence[Frame]]] = []
    for request, (start, end) in zip(requests, pairwise(bounds), strict=True):
        own = failures[(failures["column"] >= start) & (failures["column"] < end)]
        own["column"] -= start
        one = Header(header.kind, request, (t, end - start, *times_and_sentences, ()))
        answers.append((one, [frames[0], y[:, start:end].tobytes(), own.tobytes()]))
    return answers


def stepped(header: Header, frames: Sequence[Frame], steps: int, columns: int, outputs: int) -> Stepped:
    """The answer to a block of T × N frames, and to no other; see `apart`."""
    t, n, queue_us, compute_us, send_us, sentences, also = header.fields
    if type(t) is not int or type(n) is not int or (t, n, also) != (steps, columns, ()):
        raise MalformedMessage(f"the block had {steps} x {columns} frames, the answer has another number")
    times = (
        wire.count_field(queue_us, "queue_us", _MOST, 0),
        wire.count_field(compute_us, "compute_us", _MOST, 0),
        wire.count_field(send_us, "send_us", _MOST, 0),
    )
    y: F32 = wire.array_frame(frames[1], "<f4", (steps, columns, outputs), "y")
    failures = _failures(frames[2], sentences, columns, steps) if len(frames[2]) else []
    return Stepped(y, failures, times)


def closed(header: Header, frames: Sequence[Frame], count: int, row_bytes: int) -> tuple[U8, list[ColumnError]]:
    """Final states as rows of bytes [count, row_bytes], and what was refused."""
    _count(header.fields[0], count)
    finals: U8 = wire.array_frame(frames[1], "u1", (count, row_bytes), "final states")
    return finals, _failures(frames[2], header.fields[1], count, 1)


def state_read(
    header: Header, frames: Sequence[Frame], count: int, row_bytes: int
) -> tuple[U64, U8, list[ColumnError]]:
    """Next seqs [count], states as rows of bytes [count, row_bytes], and what was refused."""
    _count(header.fields[0], count)
    seqs: U64 = wire.array_frame(frames[1], "<u8", (count,), "seqs")
    states: U8 = wire.array_frame(frames[2], "u1", (count, row_bytes), "states")
    return seqs, states, _failures(frames[3], header.fields[1], count, 1)


def changed(header: Header, frames: Sequence[Frame], count: int) -> list[ColumnError]:
    """What was not changed."""
    _count(header.fields[0], count)
    return _failures(frames[1], header.fields[1], count, 1)


def statistics(header: Header) -> dict[str, float]:
    """The server's numbers by name."""
    pairs = header.fields[0]
    if type(pairs) is not tuple:
        raise MalformedMessage("statistics must be an array of [name, value]")
    numbers: dict[str, float] = {}
    for pair in pairs:
        if type(pair) is not tuple or len(pair) != 2:
            raise MalformedMessage("a statistic must be [name, value]")
        numbers[_text(pair[0], "a statistic's name")] = _number(pair[1], "a statistic")
    return numbers


def error(header: Header) -> ErrorReply:
    """Why a message was refused, and when to try again."""
    code, sentence, retry_after_us = header.fields
    wire.count_field(retry_after_us, "retry_after_us", 3_600_000_000, 0)
    return ErrorReply(_code(code), _text(sentence, "the sentence"), retry_after_us / 1e6)


def evicted(header: Header, frames: Sequence[Frame]) -> tuple[U64, Code, str]:
    """Handles of streams that the server ended, and why."""
    n, code, sentence = header.fields
    count = wire.count_field(n, "N", _MOST)
    handles: U64 = wire.array_frame(frames[1], "<u8", (count,), "handles")
    return handles, _code(code), _text(sentence, "the sentence")


def goodbye(header: Header) -> str:
    """The server's last words."""
    return _text(header.fields[0], "the sentence")


def _failures(frame: Frame, sentences: Any, columns: int, steps: int) -> list[ColumnError]:
    count, rest = divmod(len(frame), wire.FAILURE.itemsize)
    if rest or count > columns:
        raise MalformedMessage("the failures are not one entry a failed column")
    if type(sentences) is not tuple:
        raise MalformedMessage("sentences must be an array of [code, sentence]")
    said: dict[Code, str] = {}
    for pair in sentences:
        if type(pair) is not tuple or len(pair) != 2:
            raise MalformedMessage("a sentence must be [code, sentence]")
        said[_code(pair[0])] = _text(pair[1], "a sentence")
    failures: list[ColumnError] = []
    for column, timestep, number, _, expected in np.frombuffer(frame, wire.FAILURE).tolist():
        code = _code(number)
        if column >= columns or timestep >= steps:
            raise MalformedMessage("a failure names a frame outside the block")
        failures.append(ColumnError(column, timestep, code, said.get(code, wire.SENTENCES[code]), expected))
    if len({failure.column for failure in failures}) != count:
        raise MalformedMessage("a column failed twice")
    return failures


def _count(value: Any, count: int) -> None:
    if type(value) is not int or value != count:
        raise MalformedMessage(f"{count} streams were asked about, the answer is about {value!r:.20}")


def _code(value: Any) -> Code:
    if type(value) is not int or value not in _CODES:
        raise MalformedMessage(f"unknown code {value!r:.20}")
    return _CODES[value]


def _text(value: Any, name: str) -> str:
    if type(value) is not str:
        raise MalformedMessage(f"{name} must be text")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise MalformedMessage(f"{name} must be a number")
    return float(value)
