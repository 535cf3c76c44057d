"""Lists open streams for operators: one by name, or page by page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import I64
from instep.streaming.hibernation import Hibernation
from instep_client.protocol.codes import Place

SCANNED: Final = 4096
"""The most streams examined for one page, to bound its time. A page may be empty without being the last."""


class StreamStatus(NamedTuple):
    """An open stream at one moment."""

    place: Place
    owner: int | None
    """The number of its connection; None if that is gone."""
    next_seq: int | None
    """The next seq; None while it hibernates."""
    pending: int
    """The number of pending frames."""
    silent_ns: int
    """The time since it was last active or, without an owner, since its connection was lost."""
    expires_in_ns: int | None
    """The time left until it expires if it stays idle; None if it never does."""

    @property
    def idle_ns(self) -> int:
        """Time since it last had pending frames."""
        return 0 if self.pending else self.silent_ns


@dataclass(frozen=True, slots=True)
class ListedPage:
    """One page of a listing."""

    streams: list[tuple[str, StreamStatus]]
    """Streams with their names."""
    cursor: int
    """The cursor of the next page; 0 after the last."""


class Listing:
    """Pages of streams: first those in memory by slot, then those that hibernate, the longest first."""

    def __init__(self, table: StreamTable, hibernation: Hibernation) -> None:
        self._table = table
        self._hibernation = hibernation

    def counts(self) -> Counter[int]:
        """How many streams count towards each principal, in memory and hibernating."""
        return Counter(dict(enumerate(self._table.counts().tolist()))) + self._hibernation.count_of

    def find(self, name: str, now_ns: int) -> StreamStatus | None:
        """The open stream of a name, if it exists; `now_ns` is on the monotonic clock."""
        slots = self._table.find([name])
        if slots[0] != SCRATCH_SLOT and not self._table.closing[slots[0]]:
            return self._in_memory(slots, now_ns)[0]
        return self._asleep(name, now_ns) if name in self._hibernation else None

    def page(self, cursor: int, most: int, place: int, accepts: Callable[[str], bool], now_ns: int) -> ListedPage:
        """List streams from a cursor on.

        Args:
            cursor: 0 for the first page, otherwise the cursor of the page before.
            most: the most streams on the page.
            place: a `Place`, or 0 for any.
            accepts: whether to list the stream of a name.
            now_ns: on the monotonic clock.
        """
        slots = len(self._table.owner)
        if cursor < slots:
            return self._page_in_memory(cursor, most, place, accepts, now_ns)
        if place not in (0, Place.HIBERNATING):
            return ListedPage([], 0)
        names = list(islice(self._hibernation, cursor - slots, cursor - slots + SCANNED))
        found = [at for at, name in enumerate(names) if accepts(name)]
        after = cursor + (found[most] if len(found) > most else len(names))
        streams = [(names[at], self._asleep(names[at], now_ns)) for at in found[:most]]
        return ListedPage(streams, after if after < slots + len(self._hibernation) else 0)

    def _page_in_memory(
        self, first: int, most: int, place: int, accepts: Callable[[str], bool], now_ns: int
    ) -> ListedPage:
        table = self._table
        end = min(first + SCANNED, len(table.owner))
        if place == Place.HIBERNATING:
            return ListedPage([], end)
        slots = table.open_between(first, end, parked=place == Place.PARKED if place else None)
        named = [slot for slot in slots.tolist() if accepts(table.name(slot))]
        chosen = np.array(named[:most], np.int64)
        streams = list(zip(table.names(chosen), self._in_memory(chosen, now_ns), strict=True))
        return ListedPage(streams, named[most] if len(named) > most else end)

    def _in_memory(self, slots: I64, now_ns: int) -> list[StreamStatus]:
        table, limits = self._table, self._hibernation.limits
        silent_ns: I64 = np.maximum(0, now_ns - table.last_active_ns[slots])
        columns = (
            table.owner[slots],
            table.next_seq[slots],
            table.unanswered[slots],
            silent_ns,
            np.where(table.unanswered[slots] > 0, 0, silent_ns),
        )
        statuses = []
        for number, seq, pending, silent, idle in zip(*(each.tolist() for each in columns), strict=True):
            owner = None if number == table.parked else number
            place = Place.PARKED if owner is None else Place.CONNECTED
            expires_in_ns = limits.expires_in_ns(idle, has_owner=owner is not None)
            statuses.append(StreamStatus(place, owner, seq, pending, silent, expires_in_ns))
        return statuses

    def _asleep(self, name: str, now_ns: int) -> StreamStatus:
        sleeper = self._hibernation[name]
        owner = None if sleeper.owner is None else sleeper.owner.number
        silent_ns = max(0, now_ns - sleeper.since_ns)
        limits = self._hibernation.limits
        expires_in_ns = limits.expires_in_ns(silent_ns, has_owner=owner is not None)
        return StreamStatus(Place.HIBERNATING, owner, None, 0, silent_ns, expires_in_ns)
