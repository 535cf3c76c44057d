"""The newest events of a model's streams: what happened to which stream, and when. For people who look at a server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from instep.core.typing import I64

MOST: Final = 4096
"""Events that are kept."""

EventKind: TypeAlias = Literal[
    "opened",
    "resumed",
    "parked",
    "closed",
    "evicted",
    "fenced",
    "hibernated",
    "woken",
    "refused",
    "lost",
    "moved",
    "mismatch",
    "checkpoint",
    "swapped",
]


class Event(NamedTuple):
    """One thing that happened."""

    number: int
    """From 1; every event has the next one."""
    time_s: float
    """Unix time, UTC."""
    kind: EventKind
    stream: str
    """Its name; empty where the event concerns no single stream."""
    detail: str
    seq: int | None
    """The frame that the stream expected next, or that the event is about."""


class _Entry(NamedTuple):
    """Events that happened to several streams at once; thousands may be parked in one tick, and few look at the log."""

    first: int
    time_s: float
    kind: EventKind
    streams: Sequence[str]
    detail: str
    seqs: Sequence[int | None]


class EventLog:
    """A ring of the newest events. Adding costs the same for one stream and for many, but for the copy of the names.

    Args:
        most: events that are kept.
        on_event: told of each addition: the kind, the names of the streams, and the detail.
    """

    def __init__(
        self, most: int = MOST, on_event: Callable[[EventKind, Sequence[str], str], None] = lambda *event: None
    ) -> None:
        self._most = most
        self._on_event = on_event
        self._entries: deque[_Entry] = deque()
        self.newest = 0
        """The number of the newest event; 0 where there is none."""

    def add(self, kind: EventKind, stream: str = "", detail: str = "", seq: int | None = None) -> None:
        """Something has happened now."""
        self._append(kind, [stream], detail, [seq])

    def add_all(self, kind: EventKind, streams: Sequence[str], detail: str = "", seqs: I64 | None = None) -> None:
        """The same has happened to streams now; `seqs` is int64 [N]."""
        if streams:
            self._append(kind, streams, detail, [None] * len(streams) if seqs is None else seqs.tolist())

    def _append(self, kind: EventKind, streams: Sequence[str], detail: str, seqs: Sequence[int | None]) -> None:
        dropped = max(0, len(streams) - self._most)
        first = self.newest + 1 + dropped
        self.newest += len(streams)
        self._on_event(kind, streams, detail)
        self._entries.append(_Entry(first, time.time(), kind, streams[dropped:], detail, seqs[dropped:]))
        while self._entries[0].first + len(self._entries[0].streams) <= self.newest - self._most + 1:
            self._entries.popleft()

    def since(self, number: int, stream: str | None = None) -> list[Event]:
        """The events after that number, oldest first; of one stream, or of all and none."""
        oldest = max(number, self.newest - self._most)
        return [
            Event(entry.first + at, entry.time_s, entry.kind, name, entry.detail, seq)
            for entry in self._entries
            if entry.first + len(entry.streams) > oldest + 1
            for at, (name, seq) in enumerate(zip(entry.streams, entry.seqs, strict=True))
            if entry.first + at > oldest and stream in (None, name)
        ]
