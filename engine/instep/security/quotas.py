"""What each principal uses of the server, against its quotas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from instep.security.principals import LOCAL, Principal
from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code

_NUMBERS: Final = ("frames_total", "refused_total", "unread_bytes", "connections", "streams")
_RETRY_US: Final = 1_000_000
_UNREAD_RETRY_US: Final = 100_000


@dataclass(slots=True)
class TokenBucket:
    """Limits a rate. A burst may come at once, and any number is taken while the bucket is not overdrawn."""

    _left: float = math.inf
    _counted_s: float = 0.0

    def take(self, count: float, rate: float, burst: float, now_s: float) -> float:
        """Take this many, and return 0; or take nothing, and return the seconds after which they may be taken."""
        self._left = min(burst, self._left + (now_s - self._counted_s) * rate)
        self._counted_s = now_s
        if self._left < 0:
            return -self._left / rate
        self._left -= count
        return 0.0


@dataclass(slots=True, eq=False)
class Usage:
    """What one principal uses, on all of its connections; the checks raise a Refusal."""

    principal: Principal
    """Its rights in the newest peers file, not those at HELLO."""
    number: int = 0
    """Its streams count towards this number; those of 0 are not counted."""
    counts: Callable[[], Counter[int]] = Counter
    """Counts open streams by that number."""
    connections: set[Any] = field(default_factory=set)
    kept_bytes: int = 0
    """Replies that it has not read, as far as is known, and the states of its requests under way."""
    frames_total: int = 0
    refused_total: int = 0
    """Messages that were refused because of a quota."""
    _frames: TokenBucket = field(default_factory=TokenBucket)

    def numbers(self, streams: int) -> dict[str, float]:
        """The numbers for metrics by name; `streams` is the count of its open streams."""
        numbers = self.frames_total, self.refused_total, self.kept_bytes, len(self.connections), streams
        return dict(zip(_NUMBERS, numbers, strict=True))

    @property
    def share_bytes(self) -> float:
        """The bytes after which a connection is asked whether it has read them.

        Several such shares fit into the quota, so a client that reads in time is not refused.
        """
        most = self.principal.quotas.unread_bytes
        return math.inf if most is None else most / 4 / max(1, len(self.connections))

    def check_connections(self) -> None:
        """There is to be one more connection."""
        most = self.principal.quotas.connections
        if most is not None and len(self.connections) >= most:
            raise self._refusal(Code.BUSY, _RETRY_US, f"{len(self.connections)} connections, and its quota is {most}")

    def check_streams(self, streams: int) -> None:
        """So many streams are about to be opened."""
        most = self.principal.quotas.streams
        if most is not None and (held := self.counts()[self.number]) + streams > most:
            asked = f"asked for {streams} more: {held} of {most} are used, parked and hibernating ones included"
            what = f"a quota of {most} streams, and {asked}"
            raise self._refusal(Code.TOO_MANY_STREAMS, _RETRY_US, what)

    def check_unread(self, ask: Callable[[Any], None]) -> None:
        """Something is asked for that will be answered; where too much is unread, `ask` all connections about it."""
        most = self.principal.quotas.unread_bytes
        if most is not None and self.kept_bytes > most:
            for connection in self.connections:
                ask(connection)
            what = f"left {self.kept_bytes} bytes unread, and its quota is {most}: read first"
            raise self._refusal(Code.BUSY, _UNREAD_RETRY_US, what)

    def check_frames(self, frames: int, now_ns: int) -> None:
        """Count the frames of a message; where they have to wait, they are not counted.

        A second's worth of frames may come at once, and a block is never too large: the next one waits longer.
        """
        rate = self.principal.quotas.frames_per_s
        if rate is not None and (wait_s := self._frames.take(frames, rate, rate, now_ns / 1e9)):
            what = f"sent more frames than its quota of {rate:g} a second"
            raise self._refusal(Code.BUSY, int(wait_s * 1e6) + 1, what)
        self.frames_total += frames

    def _refusal(self, code: Code, wait_us: int, what: str) -> Refusal:
        self.refused_total += 1
        return Refusal(code, retry_after_us=wait_us, sentence=f"{self.principal.name} has {what}")


class Usages:
    """The usage of everybody who has connected, by name; `counts` counts all open streams by `Usage.number`."""

    def __init__(self, counts: Callable[[], Counter[int]]) -> None:
        self._counts = counts
        self._local = Usage(LOCAL)
        self._usages: dict[str, Usage] = {}
        self._numbers = count(1)

    def numbers(self, may_see: Callable[[str], bool]) -> dict[str, dict[str, float]]:
        """The numbers of those principals with keys that the asker may see."""
        counts = self._counts()
        return {name: used.numbers(counts[used.number]) for name, used in self._usages.items() if may_see(name)}

    def of(self, principal: Principal) -> Usage:
        """The usage of a principal."""
        if principal is LOCAL:
            return self._local
        if principal.name not in self._usages:
            self._usages[principal.name] = Usage(principal, next(self._numbers), self._counts)
        return self._usages[principal.name]

    def reloaded(self, principals: Collection[Principal]) -> None:
        """Hold everybody to these quotas from now on, and forget whoever is not among them and has no connection."""
        for principal in principals:
            self.of(principal).principal = principal
        names = {principal.name for principal in principals}
        self._usages = {name: each for name, each in self._usages.items() if name in names or each.connections}
