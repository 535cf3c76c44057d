"""The messages of docs/protocol-examples.json, and the same as the code writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from instep.core.typing import F32, I32, I64, U64
from instep.frontends.zmq import encode
from instep.models.folder import make_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep.streaming.api import Grants, Refusal, Reply, StatesRead, StreamEvent
from instep.streaming.listing import ListedPage, StreamStatus
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind, Message, ServerInfo, ShardTable
from tests.docs.support.page import DOCS
from tests.support.states import gru_state, rows_of


@dataclass(frozen=True, slots=True)
class Example:
    """One message: its decoded header and its frames."""

    header: list[Any]
    frames: list[bytes]


EXAMPLES = {
    each["name"]: Example(each["header"], [bytes.fromhex(frame) for frame in each["frames"]])
    for each in json.loads((DOCS / "protocol-examples.json").read_text())
}
SEED = replace(
    make_model(
        GruDescription(features=3, gru=GruLayers(hidden_size=4)), init="constant", weight=0.5, bias=0.0, name="seed"
    ),
    output_names=("left", "right", "up", "down"),
)
MIC_1, MIC_2, MIC_3, MIC_4 = 0x1_0000_0001, 0x1_0000_0002, 0x1_0000_0003, 0x1_0000_0004
RESUMED_1, RESUMED_2 = 0x2_0000_0001, 0x2_0000_0002
EPOCH = 0x187B_0000_0000_0000
"""The examples' epochs are this and those after it."""
INFO = ServerInfo(
    protocol_version=wire.PROTOCOL_VERSION,
    boot_id="5f1d0c9a3b7e2468",
    model="seed",
    fingerprint=SEED.fingerprint,
    features=3,
    outputs=4,
    state=gru_state(1, 4),
    device="cpu",
    exactness="exact",
    arithmetic="portable-1",
    max_streams=4096,
    max_message_bytes=16 * 2**20,
    max_block_frames=16_384,
    credit_frames=16_384,
    max_idle_s=3600.0,
    window_frames=32,
    durability="memory",
    park_s=300.0,
    output_names=SEED.output_names,
)
INITIAL: F32 = np.array([[0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5]], np.float32)
FIRST: F32 = np.array([[[1, 0.5, 0], [0, 0, -1]]], np.float32)
SECOND: F32 = np.array([[[0, 1, 0], [0.25, 0.25, 0.5]], [[-1, 0, 2], [np.nan, 0, 0]]], np.float32)


def floats(label: str) -> F32:
    return np.frombuffer(EXAMPLES[label].frames[1], "<f4")


def u64(*values: int) -> U64:
    return np.array(values, np.uint64)


def i32(*values: int) -> I32:
    return np.array(values, np.int32)


def i64(*values: int) -> I64:
    return np.array(values, np.int64)


def step(request: int, seq: int, x: F32, first: int = MIC_1, second: int = MIC_2) -> Message:
    columns = np.array([(first, seq, seq), (second, seq, seq)], wire.COLUMN)
    return [wire.pack_step(request, len(x), x.shape[2], columns.tobytes()), x.tobytes()]


def stepped(label: str, messages: I64, shape: tuple[int, int], times_us: I64, failures: I64 | None = None) -> Message:
    return encode.stepped(Reply(messages, floats(label).reshape(*shape, 4), failures, 0, *(1000 * times_us).tolist()))


def granted(kind: Kind, request: int, *entries: tuple[int, int, int, int, int]) -> Message:
    """Handle, epoch, next seq, code and expected seq of each stream."""
    handles, epochs, next_seqs, codes, expected_seqs = zip(*entries, strict=True)
    return encode.granted(
        kind, request, Grants(u64(*handles), u64(*epochs), i64(*next_seqs), i32(*codes), i64(*expected_seqs)), "memory"
    )


TABLE = ShardTable(u64(1, 4, 2), ("tcp://10.0.0.1:5757", "", "tcp://10.0.0.2:5759"))
WHAT_THE_CODE_SAYS: dict[str, Message] = {
    "HELLO": [wire.pack_header(Kind.HELLO, 1, wire.PROTOCOL_VERSION, "demo", "")],
    "WELCOME": encode.welcome(1, INFO),
    "OPEN": [wire.pack_header(Kind.OPEN, 2, 2, 0, 0), wire.pack_names(["mic-1", "mic-2"]), b"", b""],
    "OPENED": granted(Kind.OPENED, 2, (MIC_1, EPOCH + 1, 0, 0, 0), (MIC_2, EPOCH + 2, 0, 0, 0)),
    "OPEN-states": [
        wire.pack_header(Kind.OPEN, 3, 2, 1, 1),
        wire.pack_names(["mic-1", "mic-3"]),
        INITIAL.tobytes(),
        u64(0, 100).tobytes(),
    ],
    "OPENED-refused": granted(Kind.OPENED, 3, (0, 0, 0, Code.NAME_IN_USE, 0), (MIC_3, EPOCH + 3, 100, 0, 0)),
    "STEP": step(4, 0, FIRST),
    "STEPPED": stepped("STEPPED", np.array([[4], [2]]), (1, 2), i64(120, 480, 60)),
    "STEPPED-several": stepped("STEPPED", np.array([[16, 17], [1, 1]]), (1, 2), i64(120, 480, 60)),
    "STEP-partial": step(5, 1, SECOND),
    "STEPPED-partial": stepped(
        "STEPPED-partial",
        np.array([[5], [2]]),
        (2, 2),
        i64(95, 455, 40),
        np.array([[0, Code.NOT_FINITE], [2, 1], [3, 2]], np.int64),
    ),
    "PING": [wire.pack_header(Kind.PING, 6)],
    "PONG": encode.pong(6),
    "STATS": [wire.pack_header(Kind.STATS, 7)],
    "STATISTICS": encode.statistics(7, {"frames_total": 5.0, "streams_open": 3.0}),
    "READ_STATE": [wire.pack_header(Kind.READ_STATE, 8, 2, 0), u64(MIC_1, MIC_2).tobytes()],
    "STATE_READ": encode.state_read(8, StatesRead(i64(3, 2), rows_of(floats("CLOSED").reshape(2, 1, 4)), i32(0, 0))),
    "FORK": [wire.pack_header(Kind.FORK, 9, 1), u64(MIC_1).tobytes(), b"mic-4"],
    "OPENED-fork": granted(Kind.OPENED, 9, (MIC_4, EPOCH + 4, 3, 0, 0)),
    "RESET": [wire.pack_header(Kind.RESET, 10, 1, 0), u64(MIC_4).tobytes(), b""],
    "CHANGED": encode.changed(10, i32(0)),
    "RESUME": [
        wire.pack_header(Kind.RESUME, 11, 3, 0),
        wire.pack_names(["mic-1", "mic-2", "mic-9"]),
        np.array([(1, EPOCH + 1), (1, EPOCH + 2), (7, EPOCH)], wire.CLAIM).tobytes(),
    ],
    "RESUMED": granted(
        Kind.RESUMED,
        11,
        (RESUMED_1, EPOCH + 5, 3, 0, 3),
        (RESUMED_2, EPOCH + 6, 2, 0, 2),
        (0, 0, 0, Code.UNKNOWN_STREAM, 0),
    ),
    "STEP-again": step(12, 1, SECOND, RESUMED_1, RESUMED_2),
    "CLOSE": [wire.pack_header(Kind.CLOSE, 13, 2), u64(RESUMED_1, 3, RESUMED_2, 2).tobytes()],
    "CLOSED": encode.closed(13, rows_of(floats("CLOSED").reshape(2, 1, 4)), i32(0, 0)),
    "LIST": [wire.pack_header(Kind.LIST, 18, 0, 100, 0), b"mic-"],
    "LISTED": encode.listed(
        18,
        ListedPage(
            [
                ("mic-4", StreamStatus(wire.Place.CONNECTED, 1, 3, 0, 2_000_000_000, 3_598_000_000_000)),
                ("mic-5", StreamStatus(wire.Place.HIBERNATING, 2, None, 0, 9_000_000_000, None)),
            ],
            cursor=0,
        ),
    ),
    "MODELS": [wire.pack_header(Kind.MODELS, 19)],
    "SERVED": encode.served(19, {"seed": (5, 3, 2, 3, 4), "ears": (0, 0, 0, 40, 128)}),
    "REMOVE": [wire.pack_header(Kind.REMOVE, 20, 1, 1), b"mic-3"],
    "EVICTED": encode.evicted(StreamEvent(Code.FENCED, u64(MIC_1, MIC_2))),
    "MOVED": encode.moved(u64(MIC_1, MIC_2), i64(3, 2), "90c2"),
    "SHARDS": [wire.pack_header(Kind.SHARDS, 23)],
    "SHARDED": TABLE.pack(23),
    "WOKEN": encode.woken(u64(MIC_1), u64(RESUMED_1)),
    "ERROR": encode.error(15, Refusal(Code.BUSY, retry_after_us=2000)),
    "GOODBYE": encode.goodbye("the server is shutting down: it was asked to"),
}
