"""The server's messages, checked field by field. Every function raises MalformedMessage, and nothing else."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.state_spec import U8, InvalidStateSpec, StateSpec
from instep_client.protocol.wire import F32, U64, Code, Frame, GrantArray, Header, ServerInfo

_MOST: Final = 2**63 - 1
_CODES: Final = {int(code): code for code in Code}


class ColumnError(NamedTuple):
    """A failure with its code's sentence."""

    column: int
    timestep: int
    code: Code
    sentence: str
    expected_seq: int


class Stepped(NamedTuple):
    """The reply to one STEP: outputs [T, N, outputs], what failed, and (queue_us, compute_us, send_us)."""

    request: int
    outputs: F32
    failures: list[ColumnError]
    times: tuple[int, int, int]


class ErrorReply(NamedTuple):
    """The contents of ERROR."""

    code: Code
    sentence: str
    retry_after_s: float


class ListedStream(NamedTuple):
    """A stream of the server, whoever owns it."""

    name: str
    place: str
    """`connected`, `parked` (its connection is gone) or `hibernating` (in the recording alone)."""
    next_seq: int | None
    """The seq of its next frame; None if it hibernates."""
    pending: int
    """The number of frames admitted and not answered yet."""
    idle_s: float
    """Seconds since it was last active."""
    expires_in_s: float | None
    """Seconds for which the server keeps it if it stays idle; None if it never expires."""


class ServedModel(NamedTuple):
    """A model of the server."""

    name: str
    features: int
    outputs: int
    streams: int
    """The number of open streams, including parked and hibernating ones."""
    connections: int
    frames: int
    """The number of frames stepped since the server started the model."""


def welcome(header: Header, frames: Sequence[Frame]) -> ServerInfo:
    """The server's description of itself."""
    values: list[Any] = []
    for (name, kind), value in zip(ServerInfo.__annotations__.items(), header.fields, strict=False):
        if name == "state":
            try:
                values.append(StateSpec.decode(value))
            except InvalidStateSpec as error:
                raise MalformedMessage(f"WELCOME describes a state that cannot be: {error}") from None
        elif kind == "int":
            values.append(wire.count_field(value, name, _MOST, at_least=name not in ("shard", "term")))
        elif kind == "float":
            values.append(_number(value, name))
        else:
            values.append(_text(value, name))
    info = ServerInfo(*values)
    if not info.shard < info.shards <= wire.MAX_SHARDS:
        raise MalformedMessage(f"a server cannot be shard {info.shard} of {info.shards}")
    if not len(frames[1]):
        return info
    names = tuple(wire.unpack_names(frames[1], info.outputs))
    if not all(name and name.isprintable() for name in names):
        raise MalformedMessage("an output's name must be printable")
    return replace(info, output_names=names)


def granted(header: Header, frames: Sequence[Frame], count: int) -> tuple[GrantArray, list[ColumnError]]:
    """OPENED or RESUMED: grants [count], with handle 0 if refused, and the refusals."""
    n, durability, sentences = header.fields
    _count(n, count)
    _text(durability, "durability")
    grants: GrantArray = wire.array_frame(frames[1], wire.GRANT, (count,), "grants")
    failures = _failures(frames[2], sentences, count)
    if {failure.column for failure in failures} != set(np.flatnonzero(grants["handle"] == 0).tolist()):
        raise MalformedMessage("the refused streams are not those without a handle")
    return grants, failures


def stepped(frames: Sequence[Frame]) -> list[Stepped]:
    """The replies to the requests that one STEPPED answers, in order."""
    answered, times, y, failures = wire.unpack_stepped(frames)
    replies, ends, end = [], [], 0
    for request, columns in answered:
        start, end = end, end + columns
        ends.append(end)
        replies.append(Stepped(request, y if columns == y.shape[1] else y[:, start:end], [], times))
    if len(failures):
        if len(np.unique(failures["column"])) != len(failures):
            raise MalformedMessage("a column failed twice")
        for column, timestep, number, _, expected in failures.tolist():
            if column >= y.shape[1] or timestep >= len(y) or not number:
                raise MalformedMessage("a failure names a frame outside the block, or no code")
            owner, code = bisect_right(ends, column), Code(number)
            start = ends[owner] - replies[owner].outputs.shape[1]
            replies[owner].failures.append(ColumnError(column - start, timestep, code, code.sentence, expected))
    return replies


def closed(header: Header, frames: Sequence[Frame], count: int, row_bytes: int) -> tuple[U8, list[ColumnError]]:
    """Final states as rows of bytes [count, row_bytes], and the refusals."""
    _count(header.fields[0], count)
    finals: U8 = wire.array_frame(frames[1], "u1", (count, row_bytes), "final states")
    return finals, _failures(frames[2], header.fields[1], count)


def state_read(
    header: Header, frames: Sequence[Frame], count: int, row_bytes: int
) -> tuple[U64, U8, list[ColumnError]]:
    """Next seqs [count], states as rows of bytes [count, row_bytes], and the refusals."""
    _count(header.fields[0], count)
    seqs: U64 = wire.array_frame(frames[1], "<u8", (count,), "seqs")
    states: U8 = wire.array_frame(frames[2], "u1", (count, row_bytes), "states")
    return seqs, states, _failures(frames[3], header.fields[1], count)


def changed(header: Header, frames: Sequence[Frame], count: int) -> list[ColumnError]:
    """The streams that were not changed."""
    _count(header.fields[0], count)
    return _failures(frames[1], header.fields[1], count)


def statistics(header: Header, frames: Sequence[Frame]) -> dict[str, float]:
    """The server's numbers by name."""
    pairs = _pairs(header.fields[0], "a statistic")
    return {_text(name, "a statistic's name"): _number(value, "a statistic") for name, value in pairs}


def listed(header: Header, frames: Sequence[Frame]) -> tuple[list[ListedStream], int]:
    """A page of the server's streams, and the cursor of the next page, 0 after the last."""
    n, cursor = header.fields
    count = wire.count_field(n, "N", wire.MAX_BLOCK_STREAMS, at_least=0)
    wire.count_field(cursor, "the cursor", 2**62, at_least=0)
    names = wire.unpack_names(bytes(frames[1]), count) if count else []
    streams = []
    for name, record in zip(names, wire.array_frame(frames[2], wire.LISTING, (count,), "listings"), strict=True):
        next_seq, idle_us, expires_in_us, place, pending = record.tolist()
        if place not in set(wire.Place):
            raise MalformedMessage(f"a stream is at place {place}, which there is not")
        streams.append(
            ListedStream(
                name,
                wire.Place(place).name.lower(),
                None if next_seq == wire.UNKNOWN else next_seq,
                pending,
                idle_us / 1e6,
                None if expires_in_us == wire.UNKNOWN else expires_in_us / 1e6,
            )
        )
    return streams, cursor


def served(header: Header, frames: Sequence[Frame]) -> list[ServedModel]:
    """The server's models."""
    count = wire.count_field(header.fields[0], "N", wire.MAX_BLOCK_STREAMS)
    names = wire.unpack_names(bytes(frames[1]), count)
    records = wire.array_frame(frames[2], wire.MODEL, (count,), "models")
    return [
        ServedModel(name, features, outputs, streams, connections, stepped)
        for name, (stepped, streams, connections, features, outputs) in zip(names, records.tolist(), strict=True)
    ]


def error(header: Header) -> ErrorReply:
    """The reason why a message was refused, and when to try again."""
    code, sentence, retry_after_us = header.fields
    wire.count_field(retry_after_us, "retry_after_us", 3_600_000_000, 0)
    return ErrorReply(_code(code), _text(sentence, "the sentence"), retry_after_us / 1e6)


def evicted(header: Header, frames: Sequence[Frame]) -> tuple[U64, Code, str]:
    """Handles of streams that the server ended, and the reason."""
    n, code, sentence = header.fields
    count = wire.count_field(n, "N", _MOST)
    handles: U64 = wire.array_frame(frames[1], "<u8", (count,), "handles")
    return handles, _code(code), _text(sentence, "the sentence")


def moved(header: Header, frames: Sequence[Frame]) -> tuple[U64, U64]:
    """Handles and next seqs of streams that another version of the model computes now."""
    n, fingerprint = header.fields
    _text(fingerprint, "the fingerprint")
    count = wire.count_field(n, "N", _MOST, 0)
    handles, seqs = (wire.array_frame(frame, "<u8", (count,), "streams") for frame in frames[1:])
    return handles, seqs


def woken(header: Header, frames: Sequence[Frame]) -> tuple[U64, U64]:
    """Former and new handles of streams that hibernated."""
    count = wire.count_field(header.fields[0], "N", _MOST)
    former, handles = (wire.array_frame(frame, "<u8", (count,), "handles") for frame in frames[1:])
    return former, handles


def goodbye(header: Header) -> str:
    """The sentence of a GOODBYE."""
    return _text(header.fields[0], "the sentence")


def _failures(frame: Frame, sentences: Any, columns: int) -> list[ColumnError]:
    """The refused streams of a message without timesteps."""
    count, rest = divmod(len(frame), wire.FAILURE.itemsize)
    if rest or count > columns:
        raise MalformedMessage("the failures are not one entry a failed column")
    said = {_code(code): _text(sentence, "a sentence") for code, sentence in _pairs(sentences, "a sentence")}
    failures: list[ColumnError] = []
    for column, timestep, number, _, expected in np.frombuffer(frame, wire.FAILURE).tolist():
        code = _code(number)
        if column >= columns or timestep:
            raise MalformedMessage("a failure names a stream that was not asked about")
        failures.append(ColumnError(column, timestep, code, said.get(code, code.sentence), expected))
    if len({failure.column for failure in failures}) != count:
        raise MalformedMessage("a column failed twice")
    return failures


def _pairs(value: Any, name: str) -> Sequence[tuple[Any, Any]]:
    if type(value) is not tuple or any(type(pair) is not tuple or len(pair) != 2 for pair in value):
        raise MalformedMessage(f"{name} must be one of an array of pairs")
    pairs: Sequence[tuple[Any, Any]] = value
    return pairs


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
