"""What each principal uses of the server, against its quotas."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count

from instep.security.principals import LOCAL, Principal


@dataclass(slots=True, eq=False)
class Usage:
    """What one principal uses, on all of its connections."""

    principal: Principal
    """As it was read last: its quotas may have changed since it connected."""
    number: int = 0
    """Its streams count towards this number; those of 0 are not counted."""
    connections: int = 0
    kept_bytes: int = 0
    """Replies that it has not read, as far as is known, and the states of its requests under way."""
    frames_total: int = 0
    refused_total: int = 0
    """Messages that were refused because of a quota."""
    _left: float = 0.0
    """Frames that it may send now; below 0 after a block larger than that."""
    _counted_ns: int = 0

    @property
    def is_full(self) -> bool:
        """Whether it has to read before it is given more."""
        most = self.principal.quotas.unread_bytes
        return most is not None and self.kept_bytes > most

    def may_connect(self) -> bool:
        """Whether there may be one more connection."""
        most = self.principal.quotas.connections
        return most is None or self.connections < most

    def wait_ns(self, frames: int, now_ns: int) -> int:
        """Count the frames of a message; where they have to wait, they are not counted.

        A second's worth of frames may come at once, and a block is never too large: the next one waits longer.
        """
        rate = self.principal.quotas.frames_per_s
        if rate is not None:
            self._left = min(rate, self._left + (now_ns - self._counted_ns) * rate / 1e9)
            self._counted_ns = now_ns
            if self._left < 0:
                return int(-self._left / rate * 1e9) + 1
            self._left -= frames
        self.frames_total += frames
        return 0


class Usages:
    """The usage of everybody who has connected, by name."""

    def __init__(self) -> None:
        self._local = Usage(LOCAL)
        self._usages: dict[str, Usage] = {}
        self._numbers = count(1)

    def __iter__(self) -> Iterator[Usage]:
        """Those of principals with keys."""
        return iter(self._usages.values())

    def of(self, principal: Principal) -> Usage:
        """The usage of a principal."""
        if principal is LOCAL:
            return self._local
        if principal.name not in self._usages:
            self._usages[principal.name] = Usage(principal, next(self._numbers))
        return self._usages[principal.name]

    def reloaded(self, principals: Collection[Principal]) -> None:
        """Hold everybody to these quotas from now on, and forget whoever is not among them and has no connection."""
        for principal in principals:
            self.of(principal).principal = principal
        names = {principal.name for principal in principals}
        self._usages = {name: each for name, each in self._usages.items() if name in names or each.connections}
