"""Servers as `top` may find them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from instep.server.server import Server
from instep_tools.top.snapshot import ModelTotals, Numbers, ObservedModel, ObservedStream, Snapshot, StreamQuery

NUMBERS = Numbers(
    {
        "ready": 1.0,
        "server_uptime_s": 270_000.0,
        "frames_total": 123_456_789_012.0,
        "batches_total": 1e9,
        "batch_size_mean": 499.5,
        "streams_open": 3_999_999.0,
        "streams_parked": 999_999.0,
        "streams_hibernated": 1_000_000.0,
        "frames_pending": 131_072.0,
        "connections": 16_384.0,
        "refused_busy_total": 1_234_567.0,
        "refused_seq_gap_total": 12.0,
        "recording_bytes": 123_456_789_012.0,
        "recording_free_bytes": 4_567_890_123_456.0,
        "commit_us_p99": 123_456.0,
        "verified_frames_total": 123_456_789_012.0,
        "verify_skipped_frames_total": 123_456_789_012.0,
        "verify_mismatches_total": 0.0,
        "verify_lag_s": 0.4,
        "recent_loop_busy": 1.0,
        **{
            f"recent_{phase}_us_{quantile}": 9_999_999.0
            for phase in ("queue", "compute", "send", "latency")
            for quantile in ("p50", "p99")
        },
    }
)
"""The largest that are likely."""

MODEL = ObservedModel(
    name="wake-word-detector",
    fingerprint="00" * 32,
    features=1024,
    outputs=1024,
    device="cuda:0",
    exactness="tolerance",
    arithmetic="torch 2.13.0 on cuda:0",
    max_streams=4_000_000,
    durability="commit",
    numbers=NUMBERS,
)


def stream(name: str, **changes: Any) -> ObservedStream:
    """A busy one."""
    return ObservedStream(name, "hibernating", 123_456.0, 999_999_999, 131_072, 359_999.0, 31_536_000.0)._replace(
        **changes
    )


def snapshot(
    time_s: float,
    streams: Sequence[ObservedStream],
    models: Sequence[str] = (),
    query: StreamQuery = StreamQuery(),  # noqa: B008
    **numbers: float,
) -> Snapshot:
    """The server at a time; numbers replace those of `NUMBERS`."""
    totals = [ModelTotals(name, 3_000_000, 16_384, int(1e9 * time_s)) for name in (models or [MODEL.name])]
    model = dataclasses.replace(MODEL, numbers=Numbers(NUMBERS | numbers))
    return Snapshot(time_s, query, totals, model, streams, len(streams))


ADMIN = {"endpoint": "127.0.0.1:0"}
TRANSPORTS = ("zmq", "http")


def endpoint_of(server: Server, transport: str) -> str:
    """Where `top` finds it."""
    if transport == "zmq":
        return server.endpoint
    assert server.admin is not None
    return server.admin.url
