"""Lists of open streams, page by page, for people who look after a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import NO_OWNER
from instep.core.typing import I64, U64
from instep.streaming.hibernation import Hibernation
from instep.streaming.idle import IdleLimits
from instep_client.protocol.codes import UNKNOWN, Place

SCANNED: Final = 4096
"""Streams that one page looks at: no page keeps the loop for long, and one may show nothing and not be the last."""
_Row: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class ListedPage:
    """Some streams."""

    names: list[str]
    columns: U64
    """uint64 [N, 5]: next seq (`UNKNOWN` while it hibernates), idle time (µs), how long it is kept if it stays idle
    (µs, `UNKNOWN` if it never expires), `Place`, pending frames."""
    cursor: int
    """Where the next page begins; 0 after the last."""


class Listing:
    """Pages of streams: those in memory by slot, then those that hibernate by how long they have done so."""

    def __init__(self, table: StreamTable, hibernation: Hibernation, limits: IdleLimits) -> None:
        self._table = table
        self._hibernation = hibernation
        self.limits = limits

    @property
    def hibernating_count(self) -> int:
        """How many streams are open and not in memory."""
        return len(self._hibernation)

    def page(self, cursor: int, most: int, place: int, prefix: str, now_ns: int) -> ListedPage:
        """The streams from a cursor on.

        Args:
            cursor: 0 for the first page, else what the page before said.
            most: streams.
            place: a `Place`, or 0 for any.
            prefix: what their names begin with.
            now_ns: on the monotonic clock.
        """
        slots = len(self._table.owner)
        if cursor < slots:
            names, records, after = self._in_memory(cursor, most, place, prefix, now_ns)
        else:
            names, records, after = self._hibernating(cursor - slots, most, place, prefix, now_ns)
            after = after + slots if after else 0
        return ListedPage(names, np.array(records, np.uint64).reshape(-1, 5), after)

    def _in_memory(
        self, first: int, most: int, place: int, prefix: str, now_ns: int
    ) -> tuple[list[str], list[_Row], int]:
        table = self._table
        end = min(first + SCANNED, len(table.owner))
        owner = table.owner[first:end]
        is_parked = owner == table.parked
        is_open = (owner != NO_OWNER) & ~table.closing[first:end]
        if place == Place.HIBERNATING:
            is_open[:] = False
        elif place:
            is_open &= is_parked == (place == Place.PARKED)
        slots: I64 = first + np.flatnonzero(is_open)
        named = [slot for slot in slots.tolist() if table.name(slot).startswith(prefix)]
        chosen = np.array(named[:most], np.int64)
        idle_ns: I64 = np.where(table.unanswered[chosen] > 0, 0, np.maximum(0, now_ns - table.last_active_ns[chosen]))
        parked, unused = table.owner[chosen] == table.parked, table.next_seq[chosen] == table.first_seq[chosen]
        columns = (chosen.tolist(), idle_ns.tolist(), parked.tolist(), unused.tolist())
        records: list[_Row] = []
        for slot, idle, lacks_owner, is_unused in zip(*columns, strict=True):
            where = Place.PARKED if lacks_owner else Place.CONNECTED
            seq, pending = int(table.next_seq[slot]), int(table.unanswered[slot])
            expires_in_us = self._expires_in_us(idle, has_owner=not lacks_owner, is_unused=is_unused)
            records.append((seq, idle // 1000, expires_in_us, int(where), pending))
        if len(named) > most:
            end = named[most]
        return [table.name(slot) for slot in chosen.tolist()], records, end

    def _hibernating(
        self, first: int, most: int, place: int, prefix: str, now_ns: int
    ) -> tuple[list[str], list[_Row], int]:
        if place not in (0, Place.HIBERNATING):
            return [], [], 0
        names: list[str] = []
        records: list[_Row] = []
        at = first
        for name, since_ns, has_owner in self._hibernation.asleep(first, SCANNED):
            if name.startswith(prefix):
                if len(names) == most:
                    break
                idle = max(0, now_ns - since_ns)
                names.append(name)
                expires_in_us = self._expires_in_us(idle, has_owner=has_owner, is_unused=False)
                records.append((UNKNOWN, idle // 1000, expires_in_us, int(Place.HIBERNATING), 0))
            at += 1
        return names, records, at if at < len(self._hibernation) else 0

    def _expires_in_us(self, idle_ns: int, *, has_owner: bool, is_unused: bool) -> int:
        expires_in_ns = self.limits.expires_in_ns(idle_ns, has_owner=has_owner, is_unused=is_unused)
        return UNKNOWN if expires_in_ns is None else expires_in_ns // 1000
