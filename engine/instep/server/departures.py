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
from instep_client.protocol.wire import Code

AT_ONCE = 4096
"""Streams that are parked or evicted in one turn of the loop, of however many connections; others wait meanwhile."""


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
        """Those of them that may have streams which are not parked or closing yet."""

    @property
    def is_busy(self) -> bool:
        """Whether streams of connections that are gone may not be parked or closing yet."""
        return bool(self._departing)

    def abandon(self, client: Client) -> None:
        """A connection is gone: from the next `tidy` on its streams are parked or closed, then its number is free.

        Thousands of connections may go in one turn of the loop, so nothing is done for each but to note it down. Until
        its turn comes a stream belongs to the number, which no other connection gets; it can be resumed all the same.
        """
        self._leaving.add(client.number)
        self._departing.add(client.number)
        self._free_numbers({client.number})

    def tidy(self) -> None:
        """Do what is due, so much of it that others do not wait for long; called now and then."""
        if self._departing:
            self._depart()
        self._evict_longest_parked()

    def may_have_left(self, numbers: set[int]) -> None:
        """These numbers have fewer streams than before; connections that are gone may have none left."""
        self._free_numbers(self._leaving & numbers)

    def _depart(self) -> None:
        owned = self._table.owned_by(*self._departing)
        slots, rest = owned[:AT_ONCE], owned[AT_ONCE:]
        departing = set(self._table.owner[slots].tolist())
        self._departing = set(self._table.owner[rest].tolist())
        if self._parks:
            self._table.park(slots, time.monotonic_ns())
            self._tap.parked(slots)
            self._statistics.parked_streams_total += len(slots)
            self._free_numbers(departing)
        else:
            self._evict(slots, Code.CLIENT_GONE)

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
