"""A line in the log now and then that says what the server does, while it does anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import structlog

_COUNTED: Final = (
    "opened_streams",
    "closed_streams",
    "parked_streams",
    "resumed_streams",
    "hibernated_streams",
    "woken_streams",
    "evicted_streams",
    "step_failures",
    "busy",
    "refused_messages",
)
"""What is said only where it happened, by the names in STATISTICS without `_total`."""
_SAID: Final = tuple(f"{name}_total" for name in ("frames", "batches", "messages", *_COUNTED))


class Summary:
    """Says every so often what has happened since it last did, by the numbers that STATISTICS has."""

    def __init__(
        self,
        log: structlog.stdlib.BoundLogger,
        statistics: Callable[[], Mapping[str, float]],
        now_s: float,
    ) -> None:
        self._log = log
        self._statistics = statistics
        self._since_s = now_s
        self._before: Mapping[str, float] = statistics()

    def tick(self, now_s: float, every_s: float) -> None:
        """Say it when it was last said `every_s` seconds ago and anything has happened since; never where that is 0."""
        seconds = now_s - self._since_s
        if not every_s or seconds < every_s:
            return
        now, before = self._statistics(), self._before
        self._since_s, self._before = now_s, now
        grown = {name: now[name] - before[name] for name in _SAID}
        if not any(grown.values()):
            return
        counts = {name: int(grown[f"{name}_total"]) for name in _COUNTED if grown[f"{name}_total"]}
        batches = grown["batches_total"]
        self._log.info(
            "served",
            seconds=round(seconds, 1),
            frames_per_s=round(grown["frames_total"] / seconds),
            messages_per_s=round(grown["messages_total"] / seconds),
            batch_size=round(grown["frames_total"] / batches, 1) if batches else 0.0,
            connections=int(now["connections"]),
            streams_open=int(now["streams_open"]),
            streams_parked=int(now["streams_parked"]),
            frames_pending=int(now["frames_pending"]),
            **counts,
        )
