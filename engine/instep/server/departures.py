"""Connections that are gone: their streams are parked or ended, some at a time, and then their numbers are free."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from instep.core.streams import StreamTable
from instep.core.typing import I64
from instep.server.clients import Client, ClientTable
from instep.server.statistics import Statistics
from instep.server.tap import Tap
from instep_client.wire import Code

AT_ONCE = 4096
"""Streams that are parked or evicted in one turn of the loop, which others wait for meanwhile."""


class Departures:
    """What becomes of the streams of connections that are gone, and of their numbers.

    Args:
        table: the streams.
        clients: connections, whose numbers own streams.
        tap: where it is recorded.
        statistics: what is counted.
        evict: ends streams for a reason.
        expire: ends parked streams.
        parks: whether streams of a connection that is gone are kept for a while.
        max_parked: the most streams that are parked at once; beyond it the longest parked are evicted.
    """

    def __init__(
        self,
        table: StreamTable,
        clients: ClientTable,
        tap: Tap,
        statistics: Statistics,
        evict: Callable[[I64, Code], None],
        expire: Callable[[I64], None],
        *,
        parks: bool,
        max_parked: int,
    ) -> None:
        self._table = table
        self._clients = clients
        self._tap = tap
        self._statistics = statistics
        self._evict = evict
        self._expire = expire
        self._parks = parks
        self._max_parked = max_parked
        self._leaving: set[int] = set()
        """Numbers of gone connections that have streams yet."""
        self._departing: set[int] = set()
        """Those of them with streams that are not parked or closing yet."""

    def abandon(self, client: Client) -> None:
        """A connection is gone: park its streams or close them, then let its number be used again.

        Many streams take several turns of the loop, those of `tidy`. Until its turn comes a stream belongs to the
        number, which no other connection gets; it can be resumed all the same.
        """
        self._leaving.add(client.number)
        self._departing.add(client.number)
        self._depart(client.number)

    def tidy(self) -> None:
        """Go on with what takes several turns; called now and then."""
        if self._departing:
            self._depart(next(iter(self._departing)))
        self._evict_longest_parked()

    def may_have_left(self, numbers: set[int]) -> None:
        """These numbers have fewer streams than before; connections that are gone may have none left."""
        self._free_numbers(self._leaving & numbers)

    def _depart(self, number: int) -> None:
        owned = self._table.owned_by(number)
        slots = owned[:AT_ONCE]
        if len(slots) == len(owned):
            self._departing.remove(number)
        if self._parks:
            self._table.park(slots, time.monotonic_ns())
            self._tap.parked(slots)
            self._statistics.parked_streams_total += len(slots)
            self._evict_longest_parked()
        else:
            self._evict(slots, Code.CLIENT_GONE)
        self._free_numbers({number})

    def _free_numbers(self, numbers: set[int]) -> None:
        """Numbers of gone connections are free once none of their streams is left, those closing before included."""
        for number in numbers:
            if not self._table.owned[number]:
                self._leaving.remove(number)
                self._departing.discard(number)
                self._clients.free_number(number)

    def _evict_longest_parked(self) -> None:
        table = self._table
        if table.owned[table.parked] <= self._max_parked:
            return
        parked = table.parked_since(np.iinfo(np.int64).max)
        excess = min(len(parked) - self._max_parked, AT_ONCE)
        if excess <= 0:
            return
        since_ns = table.last_active_ns[parked]
        oldest = parked[since_ns <= np.partition(since_ns, excess - 1)[excess - 1]]  # all of them: many have one time
        self._expire(oldest[np.argsort(table.last_active_ns[oldest], kind="stable")[:excess]])
