"""Connected origins, and the numbers under which they own streams."""

from __future__ import annotations

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import NO_OWNER, Tables
from instep.core.typing import I64, U64
from instep.streaming.api import Origin, StreamEvent
from instep_client.protocol.codes import Code


class Origins:
    """Gives numbers to origins. The number of an origin that is gone is used again once it owns nothing any more."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._capacity = len(tables.origins) - 1  # the last one owns parked streams
        self._connected: dict[int, Origin] = {}
        self._left: set[int] = set()
        """Numbers of lost origins that still have streams or pending messages."""
        self._given_out = 0
        self._free: list[int] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._connected)

    def __getitem__(self, number: int) -> Origin | None:
        """The connected origin with that number, or None."""
        return self._connected.get(number)

    def connect(self, origin: Origin) -> bool:
        """Set the number and arrival rank of an origin; False if too many are connected."""
        if self._free:
            origin.number = self._free.pop()
        elif self._given_out < self._capacity:
            origin.number = self._given_out
            self._given_out += 1
        else:
            return False
        self._arrived += 1
        origin.arrival = self._tables.origins["arrival"][origin.number] = self._arrived
        self._connected[origin.number] = origin
        return True

    def add_backlog(self, origin: Origin, frames: int) -> None:
        """Change the count of frames whose replies wait for a connected origin, which reduce its credit."""
        self._tables.origins["backlog"][origin.number] += frames

    def has_streams(self, origin: Origin) -> bool:
        """Whether a connected origin owns streams in memory."""
        return bool(self._tables.origins["streams"][origin.number])

    def is_connected(self, origin: Origin) -> bool:
        """Whether the origin is connected; another one may have its number by now."""
        return self._connected.get(origin.number) is origin

    def owners(self, table: StreamTable, slots: I64) -> list[tuple[Origin, U64]]:
        """The connected origins that own streams, each with the handles of its streams.

        These are origins and not their numbers, because a number may belong to another origin when they are notified.
        """
        slots = slots[np.argsort(table.owner[slots], kind="stable")]
        numbers, handles = table.owner[slots], table.slots.handles(slots)
        first = np.flatnonzero(np.diff(numbers, prepend=NO_OWNER))
        owners = (self[number] for number in numbers[first].tolist())
        return [
            (owner, own) for owner, own in zip(owners, np.split(handles, first[1:]), strict=False) if owner is not None
        ]

    def notify(self, owners: list[tuple[Origin, U64]], code: Code) -> None:
        """Notify owners, as returned by `owners`, of a change of their streams."""
        for owner, handles in owners:
            if self.is_connected(owner):
                owner.notify(StreamEvent(code, handles))

    def disconnect(self, origin: Origin) -> None:
        """Remove an origin that is gone; nothing is delivered to it any more."""
        del self._connected[origin.number]
        self._tables.origins["backlog"][origin.number] = self._tables.origins["arrival"][origin.number] = 0
        self._left.add(origin.number)

    def release_left(self) -> None:
        """Free the numbers of lost origins that have neither streams nor messages any more."""
        if not self._left:
            return
        records = self._tables.origins
        for number in list(self._left):
            if not records["streams"][number] and not records["messages"][number]:
                self._left.remove(number)
                self._free.append(number)
