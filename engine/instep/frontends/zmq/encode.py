"""Encodes the server's messages from arrays. It does no I/O."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from instep.core.typing import I32, I64, U8, U64
from instep.streaming.api import Grants, Refusal, Reply, StatesRead, StreamEvent
from instep.streaming.listing import ListedPage
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind, Message, pack_stepped


def _failures(codes: I32 | I64, timesteps: I64 | None = None, expected_seqs: I64 | None = None) -> wire.FailureArray:
    """One FAILURE entry for each column whose code is not 0."""
    columns = np.flatnonzero(codes)
    entries = np.zeros(len(columns), wire.FAILURE)
    entries["column"] = columns
    entries["code"] = codes[columns]
    if timesteps is not None:
        entries["timestep"] = timesteps[columns]
    if expected_seqs is not None:
        entries["expected_seq"] = expected_seqs[columns]
    return entries


def _sentences(entries: wire.FailureArray) -> list[tuple[int, str]]:
    return [(code, Code(code).sentence) for code in np.unique(entries["code"]).tolist()]


def stepped(reply: Reply) -> Message:
    """STEPPED: the reply to these messages, with their columns side by side."""
    timesteps, width, _ = reply.y.shape
    times_us = reply.queue_ns // 1000, reply.compute_ns // 1000, reply.send_ns // 1000
    failures = b"" if reply.failures is None else _failures(*reply.failures).tobytes()
    return [
        pack_stepped(reply.messages.T.tobytes(), timesteps, width, times_us, failures),
        reply.y.data.cast("B"),
    ]


def welcome(request: int, info: wire.ServerInfo) -> Message:
    """WELCOME: the fields of `ServerInfo` in order, and the names of the outputs."""
    return [wire.pack_header(Kind.WELCOME, request, *info.wire_fields()), wire.pack_names(info.output_names)]


def granted(kind: Kind, request: int, grants: Grants, durability: str) -> Message:
    """OPENED or RESUMED."""
    refused = _failures(grants.codes, None, grants.expected_seqs)
    entries = np.zeros(len(grants.codes), wire.GRANT)
    entries["handle"], entries["epoch"], entries["next_seq"] = grants.handles, grants.epochs, grants.next_seqs
    entries[grants.codes != 0] = 0
    header = wire.pack_header(kind, request, len(entries), durability, _sentences(refused))
    return [header, entries.tobytes(), refused.tobytes()]


def state_read(request: int, read: StatesRead, expected_seqs: I64 | None = None) -> Message:
    """STATE_READ."""
    frames = read.next_seqs.tobytes(), read.states.tobytes()
    return _by_stream(Kind.STATE_READ, request, read.codes, *frames, expected_seqs=expected_seqs)


def changed(request: int, codes: I32, expected_seqs: I64 | None = None) -> Message:
    """CHANGED: the states that were not written, with codes."""
    return _by_stream(Kind.CHANGED, request, codes, expected_seqs=expected_seqs)


def closed(request: int, states: U8, codes: I32) -> Message:
    """CLOSED, with the final states [N, …]."""
    return _by_stream(Kind.CLOSED, request, codes, states.tobytes())


def _by_stream(kind: Kind, request: int, codes: I32, *frames: bytes, expected_seqs: I64 | None = None) -> Message:
    """A reply with these frames, followed by the refused streams of the request, by code."""
    refused = _failures(codes, None, expected_seqs)
    return [wire.pack_header(kind, request, len(codes), _sentences(refused)), *frames, refused.tobytes()]


def pong(request: int) -> Message:
    """PONG: the reply to a PING."""
    return [wire.pack_header(Kind.PONG, request)]


def ping(number: int) -> Message:
    """PING: asks whether the peer is there and reads; a PONG of the same number is the answer."""
    return [wire.pack_header(Kind.PING, number)]


def statistics(request: int, values: dict[str, float]) -> Message:
    """STATISTICS: [[name, value], …]."""
    return [wire.pack_header(Kind.STATISTICS, request, list(values.items()))]


def listed(request: int, page: ListedPage) -> Message:
    """LISTED: a page of streams, and the cursor of the next."""
    records = [
        (
            wire.UNKNOWN if stream.next_seq is None else stream.next_seq,
            stream.idle_ns // 1000,
            wire.UNKNOWN if stream.expires_in_ns is None else stream.expires_in_ns // 1000,
            stream.place,
            stream.pending,
        )
        for _, stream in page.streams
    ]
    header = wire.pack_header(Kind.LISTED, request, len(records), page.cursor)
    return [header, wire.pack_names([name for name, _ in page.streams]), np.array(records, wire.LISTING).tobytes()]


def served(request: int, models: Mapping[str, tuple[int, int, int, int, int]]) -> Message:
    """SERVED: the fields of `wire.MODEL` of each model by its name, the default first."""
    records = np.array(list(models.values()), wire.MODEL)
    header = wire.pack_header(Kind.SERVED, request, len(models))
    return [header, wire.pack_names(list(models)), records.tobytes()]


def evicted(event: StreamEvent) -> Message:
    """EVICTED: streams that the peer no longer owns, or that hibernate."""
    header = wire.pack_header(Kind.EVICTED, 0, len(event.handles), int(event.code), event.code.sentence)
    return [header, event.handles.tobytes()]


def woken(handles: U64, renewed: U64) -> Message:
    """WOKEN: streams that hibernated are in memory again, under new handles."""
    return [wire.pack_header(Kind.WOKEN, 0, len(handles)), handles.tobytes(), renewed.tobytes()]


def moved(handles: U64, next_seqs: I64, fingerprint: str) -> Message:
    """MOVED: another version of the model serves the peer, and computes its streams from these seqs on."""
    return [wire.pack_header(Kind.MOVED, 0, len(handles), fingerprint), handles.tobytes(), next_seqs.tobytes()]


def error(request: int, refusal: Refusal) -> Message:
    """ERROR: the whole message was refused and nothing of it was applied."""
    return [wire.pack_header(Kind.ERROR, request, int(refusal.code), str(refusal)[:900], refusal.retry_after_us)]


def goodbye(sentence: str) -> Message:
    """GOODBYE: the server ends; unless it failed or was forced to, all admitted messages are answered."""
    return [wire.pack_header(Kind.GOODBYE, 0, sentence[:900])]
