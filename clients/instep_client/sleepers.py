"""Streams that hibernate on the server: they are resumed before anything is sent to them, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instep_client.arrays import Indices
from instep_client.claims import ask_for_own, take_grants
from instep_client.outbox import Outbox
from instep_client.protocol.wire import Code, GrantArray
from instep_client.replies import ColumnError
from instep_client.streams import OpenStreams


class Sleepers:
    """Who waits for which of them.

    Args:
        table: the streams; its column `asleep` says which hibernate.
        outbox: where claims go.
        max_message_bytes: the largest message that the server takes.
    """

    def __init__(self, table: OpenStreams, outbox: Outbox, max_message_bytes: int) -> None:
        self._table = table
        self._outbox = outbox
        self._max_message_bytes = max_message_bytes
        self._claimed: set[int] = set()
        """Rows of those that were asked for."""
        self._waiting: list[tuple[Indices, Callable[[], None]]] = []
        self._again_at: float | None = None

    def are_asleep(self, rows: Indices, failures: list[ColumnError]) -> Indices:
        """The columns of a request that were refused only because their streams, in these rows, hibernate."""
        unknown = (failure.column for failure in failures if failure.code is Code.UNKNOWN_STREAM)
        return np.array([column for column in unknown if self._table.asleep[rows[column]]], np.int64)

    def wake(self, rows: Indices, then: Callable[[], None]) -> None:
        """Resume those of these streams that hibernate; `then` is called when none does any more."""
        asleep = [row for row in rows[self._table.asleep[rows]].tolist() if row not in self._claimed]
        self._claimed.update(asleep)
        self._waiting.append((rows, then))
        if asleep:
            ask_for_own(self._table, self._outbox, np.array(asleep, np.int64), self._max_message_bytes)

    def resumed(
        self, part: Indices, grants: GrantArray, failures: list[ColumnError]
    ) -> dict[tuple[Code, str], list[int]]:
        """RESUMED came for some: the rows of those that have ended, by reason; `go_on` follows."""
        self._claimed.difference_update(part.tolist())
        return take_grants(self._table, part, grants, failures)

    def go_on(self) -> None:
        """Streams are awake, or have ended: call those who waited for no others."""
        waiting, self._waiting = self._waiting, []
        for rows, then in waiting:
            if self._table.asleep[rows].any():
                self._waiting.append((rows, then))
            else:
                then()

    def refused(self, part: Indices, again_at: float) -> None:
        """The server could not take a claim now."""
        self._claimed.difference_update(part.tolist())
        self._again_at = max(again_at, self._again_at or again_at)

    def deadline(self) -> float | None:
        """When `advance` is to be called though no message comes."""
        return self._again_at

    def advance(self, now: float) -> None:
        """Ask again for what was refused, when its time has come."""
        if self._again_at is not None and now >= self._again_at:
            self.ask_again()

    def lost(self) -> None:
        """The connection is lost, and with it what was asked."""
        self._claimed.clear()

    def ask_again(self) -> None:
        """Ask for all that somebody waits for: there is another connection, or time has passed."""
        self._again_at = None
        waiting, self._waiting = self._waiting, []
        for rows, then in waiting:
            self.wake(rows, then)


def without_columns(part: Indices, failures: list[ColumnError], columns: Indices) -> tuple[Indices, list[ColumnError]]:
    """A part of a request, and what failed of it, without some of its columns."""
    left = np.delete(np.arange(len(part)), columns)
    failures = [
        failure._replace(column=int(np.searchsorted(left, failure.column)))
        for failure in failures
        if failure.column in left
    ]
    return part[left], failures
