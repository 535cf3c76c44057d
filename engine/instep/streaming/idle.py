"""Idle streams: their limits, and the records of those that hibernate or have expired."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from instep.streaming.api import Origin

_MOST: Final = 65_536


@dataclass(frozen=True, slots=True)
class IdleLimits:
    """What becomes of idle streams, in memory and in the recording: times in ns, and counts."""

    max_idle_ns: int
    """Time for which a stream is kept whose connection is there; 0 for ever."""
    park_ns: int
    """Time for which one is kept whose connection is gone; 0 for not at all."""
    max_parked: int
    """The most parked streams in memory; beyond it those parked longest hibernate or, without a recording, end."""
    hibernate_after_ns: int = 0
    """A stream with nothing to do for this long hibernates; 0 for never, unless its room is needed."""
    max_hibernated: int = 1_000_000
    """The most that hibernate; beyond it those that have done so longest expire."""

    def expires_in_ns(self, idle_ns: int, *, has_owner: bool) -> int | None:
        """Time for which a stream is kept if it stays idle; None for ever."""
        if not has_owner:
            return max(0, self.park_ns - idle_ns)
        return max(0, self.max_idle_ns - idle_ns) if self.max_idle_ns else None


class Sleeper(NamedTuple):
    """A stream that hibernates."""

    stream: int
    """Its number in the recording."""
    owner: Origin | None
    """Who owned it; None where its connection was gone, or before a restart."""
    since_ns: int
    """Since when it is idle or, without an owner, since when its connection is gone."""


class Tombstones:
    """The newest names; older ones are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """Streams of these names have expired."""
        for name in names:
            self._names.pop(name, None)
            self._names[name] = None
        while len(self._names) > _MOST:
            del self._names[next(iter(self._names))]

    def remove(self, names: Iterable[str]) -> None:
        """There are streams of these names again."""
        for name in names:
            self._names.pop(name, None)
