"""The reaper: parks the streams of connections that are gone, and ends streams that are idle or parked for too long.

Everything is done in portions: thousands of connections may go at once, or one with very many streams, and the others
must not wait for it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import I64
from instep.streaming.api import Origin
from instep.streaming.engine import Engine
from instep.streaming.operations import StreamOperations
from instep_client.protocol.codes import Code

AT_ONCE: Final = 4096
"""Streams that are parked or evicted in one tick, of all connections together."""
_LOOK_EVERY: Final = 10
"""Ticks between searches for idle streams. A search looks at every stream."""


class Reaper:
    """Looks after streams without anyone at the other end."""

    def __init__(
        self,
        engine: Engine,
        operations: StreamOperations,
        at_once: int = AT_ONCE,
    ) -> None:
        self._engine = engine
        self._table = engine.table
        self._operations = operations
        self._hibernation = operations.hibernation
        self._at_once = at_once
        self._ticks = 0
        self._detaching: set[int] = set()
        """Numbers of origins that are gone and may have streams that are neither parked nor closing yet."""

    @property
    def is_detaching(self) -> bool:
        """Whether streams of connections that are gone are still to be parked or closed."""
        return bool(self._detaching)

    def detach(self, origin: Origin) -> None:
        """An origin is gone: its streams are parked or closed from the next tick on.

        Until then a stream belongs to the number of the origin, and no other origin gets that. It can be resumed.
        """
        self._engine.origins.disconnect(origin)
        self._detaching.add(origin.number)
        self._engine.origins.release_left()
        if not self._table.owned[origin.number]:
            self._detaching.discard(origin.number)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        if self._detaching:
            self._park(now_ns)
        self._evict_surplus()
        looks = self._ticks % _LOOK_EVERY == 0
        if looks:
            self._evict_idle(now_ns)
        self._hibernation.tick(now_ns, looks=looks)
        self._ticks += 1

    def _park(self, now_ns: int) -> None:
        # The number of an origin whose streams were all resumed elsewhere may be another origin's by now.
        self._detaching = {number for number in self._detaching if self._engine.origins[number] is None}
        owned = self._table.owned_by(*self._detaching)
        slots, rest = owned[: self._at_once], owned[self._at_once :]
        self._detaching = set(self._table.owner[rest].tolist())
        if not self._hibernation.limits.park_ns:
            self._operations.evict(slots, Code.CLIENT_GONE)
            return
        self._table.park(slots, now_ns)
        self._engine.journal.parked(slots)
        self._engine.stats.parked_streams_total += len(slots)
        self._engine.events.add_all("parked", self._table.names(slots), seqs=self._table.next_seq[slots])
        self._engine.origins.release_left()

    def _evict_surplus(self) -> None:
        table, most = self._table, self._hibernation.limits.max_parked
        if table.owned[table.parked] <= most:
            return
        excess = min(len(table.parked_since(np.iinfo(np.int64).max)) - most, self._at_once)
        if excess > 0 and self._hibernation.is_possible:
            self._hibernation.hibernate_parked(excess)
        elif excess > 0:
            self._operations.expire(table.parked_longest()[:excess])

    def _evict_idle(self, now_ns: int) -> None:
        limits, table = self._hibernation.limits, self._table
        if limits.max_idle_ns:
            self._operations.evict(self._connected(table.idle_since(now_ns - limits.max_idle_ns)), Code.IDLE)
        parked = table.parked_since(now_ns - limits.park_ns)
        is_free = self._engine.tables.streams["holds"][parked] == 0  # others may be about to be resumed
        self._operations.expire(parked[is_free][: self._at_once])

    def _connected(self, slots: I64) -> I64:
        """A portion of slots, without those that are still to be parked: these look idle, but they have `park_ns`."""
        is_detaching = np.isin(self._table.owner[slots], list(self._detaching))
        return slots[~is_detaching][: self._at_once]
