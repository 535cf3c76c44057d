"""What the log says of a server at work."""

from __future__ import annotations

from typing import Any

from instep.server.server import COUNTED, Summary
from tests.support.running import log_into

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
