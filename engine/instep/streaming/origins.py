"""Connected origins and their numbers, under which they own streams."""

from __future__ import annotations

from instep.core.tables import Tables
from instep.streaming.api import Origin


class Origins:
    """Gives out numbers. The number of an origin that is gone is used again when nothing belongs to it any more.

    Args:
        tables: how many streams and pending messages each number has.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._capacity = len(tables.origins) - 1  # the last one owns parked streams
        self._connected: dict[int, Origin] = {}
        self._left: set[int] = set()
        """Numbers of origins that are gone, to which something still belongs."""
        self._given_out = 0
        self._free: list[int] = []
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._connected)

    def __getitem__(self, number: int) -> Origin | None:
        """The connected origin of that number."""
        return self._connected.get(number)

    def connect(self, origin: Origin) -> bool:
        """Set the number and the arrival number of an origin; False where too many are connected."""
        if self._free:
            origin.number = self._free.pop()
        elif self._given_out < self._capacity:
            origin.number = self._given_out
            self._given_out += 1
        else:
            return False
        self._arrived += 1
        origin.arrival = self._arrived
        self._connected[origin.number] = origin
        return True

    def is_connected(self, origin: Origin) -> bool:
        """Whether the origin is connected; its number may belong to another one by now."""
        return self._connected.get(origin.number) is origin

    def disconnect(self, origin: Origin) -> None:
        """The origin is gone: it gets nothing any more."""
        del self._connected[origin.number]
        self._tables.origins["backlog"][origin.number] = 0
        self._left.add(origin.number)

    def release_left(self) -> None:
        """Let numbers be used again to which nothing belongs any more."""
        if not self._left:
            return
        records = self._tables.origins
        for number in list(self._left):
            if not records["streams"][number] and not records["messages"][number]:
                self._left.remove(number)
                self._free.append(number)
