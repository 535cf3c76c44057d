"""What the log says of a server at work."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from instep.server.server import COUNTED, Summary
from instep_client.protocol.wire import Kind
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import log_into, running
from tests.support.streaming import random_frames

STATISTICS = dict.fromkeys(map("{}_total".format, ("frames", "batches", "messages", *COUNTED)), 5.0) | {
    "connections": 2.0,
    "streams_open": 3.0,
    "streams_parked": 1.0,
    "frames_pending": 0.0,
}


def test_it_says_what_has_happened_since_it_last_did() -> None:
    told: list[dict[str, Any]] = []
    now = dict(STATISTICS)
    summary = Summary(log_into(told), lambda: dict(now), now_s=100.0)
    now |= {"frames_total": 405.0, "batches_total": 25.0, "messages_total": 105.0, "opened_streams_total": 8.0}
    summary.tick(109.9, 10.0)
    summary.tick(1000.0, 0.0)  # never
    assert told == []
    summary.tick(110.0, 10.0)
    summary.tick(120.0, 10.0)
    assert told == [
        {
            "level": "info",
            "event": "served",
            "seconds": 10.0,
            "frames_per_s": 40,
            "messages_per_s": 10,
            "batch_size": 20.0,
            "connections": 2,
            "streams_open": 3,
            "streams_parked": 1,
            "frames_pending": 0,
            "opened_streams": 3,
        }
    ]
    now["busy_total"] += 7
    summary.tick(130.0, 10.0)
    assert (told[-1]["busy"], told[-1]["batch_size"]) == (7, 0.0)


async def test_connections_and_requests_are_logged_for_those_who_look(rng: np.random.Generator) -> None:
    told: list[dict[str, Any]] = []
    async with running(SMALL, told=told, log={"summary_s": 0.05}, transport={"heartbeat_s": 0.1}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.step(handles, [0], random_frames(rng, 1))
            await client.ask(msgpack.packb([Kind.OPEN, 99, 0, 0, 0]), b"", b"", b"")
        async with RawClient(server.endpoint) as other:
            await other.hello()
            while not any(line["event"] == "disconnected" for line in told):
                await other.statistics()
    by_event = {line["event"]: line for line in told}
    assert by_event["connected"]["level"] == "debug"
    assert by_event["request"]["request"] == "OPEN"
    assert by_event["refused"]["code"] == "MALFORMED"
    gone = [line["streams"] for line in told if line["event"] == "disconnected"]
    assert gone in ([1], [1, 0]), "the other one may be noticed before the server ends"
    assert by_event["served"]["level"] == "info"
