"""Streams that hibernate on the server: they are resumed before anything is sent to them, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.calls import Call
from instep_client.claims import ask_for_own, take_grants
from instep_client.outbox import Outbox
from instep_client.protocol.wire import Code, GrantArray
from instep_client.replies import ColumnError
from instep_client.streams import OpenStreams

_RETRY_S: Final = 0.5
"""How long to wait where the server has no room for a stream that hibernates."""


class _Waiter:
    """Something to be done when streams are awake, or have ended."""

    __slots__ = ("call", "left", "then")

    def __init__(self, left: int, then: Callable[[], None], call: Call[Any] | None) -> None:
        self.left = left
        """How many of its streams still hibernate."""
        self.then = then
        self.call = call


class Sleepers:
    """The streams that hibernate, and the calls that wait for them.

    Args:
        table: the streams; its column `asleep` says which hibernate.
        outbox: where claims go.
        max_message_bytes: the largest message that the server takes.
    """

    def __init__(self, table: OpenStreams, outbox: Outbox, max_message_bytes: int) -> None:
        self._table = table
        self._outbox = outbox
        self._max_message_bytes = max_message_bytes
        self._waiters: dict[int, list[_Waiter]] = {}
        """By row."""
        self._claimed: set[int] = set()
        """Rows of those that were asked for."""
        self._again_at: float | None = None

    def are_asleep(self, rows: Indices, failures: list[ColumnError]) -> Indices:
        """The columns of a request that were refused only because their streams, in these rows, hibernate."""
        unknown = (failure.column for failure in failures if failure.code is Code.UNKNOWN_STREAM)
        return np.array([column for column in unknown if self._table.asleep[rows[column]]], np.int64)

    def wake(self, rows: Indices, then: Callable[[], None], call: Call[Any] | None = None) -> None:
        """Resume those of these streams that hibernate; `then` is called when none does any more.

        Args:
            rows: of the streams.
            then: what to do. It is forgotten with a lost connection where it is for a call: that is asked anew.
            call: what it is for, if it is for a request.
        """
        asleep = rows[self._table.asleep[rows]].tolist()
        waiter = _Waiter(len(asleep), then, call)
        for row in asleep:
            self._waiters.setdefault(row, []).append(waiter)
        if not asleep:
            then()

    def advance(self, now: float) -> None:
        """Ask for all that somebody waits for and that was not asked for."""
        if self._again_at is not None and now < self._again_at:
            return
        self._again_at = None
        wanted = [row for row in self._waiters if row not in self._claimed]
        if wanted:
            self._claimed.update(wanted)
            ask_for_own(self._table, self._outbox, np.array(sorted(wanted), np.int64), self._max_message_bytes)

    def deadline(self) -> float | None:
        """When `advance` is to be called though no message comes."""
        return self._again_at

    def resumed(
        self, part: Indices, grants: GrantArray, failures: list[ColumnError], now: float
    ) -> dict[tuple[Code, str], list[int]]:
        """RESUMED came for some: the rows of those that have ended, by reason; `go_on` follows."""
        self._claimed.difference_update(part.tolist())
        ended = take_grants(self._table, part, grants, failures)
        if self._table.asleep[part].any():
            self._again_at = now + _RETRY_S
        return ended

    def refused(self, part: Indices, again_at: float) -> None:
        """The server could not take a claim now."""
        self._claimed.difference_update(part.tolist())
        self._again_at = max(again_at, self._again_at or again_at)

    def go_on(self, part: Indices) -> None:
        """Streams are awake, or have ended: do what waited for no others."""
        for row in part[~self._table.asleep[part]].tolist():
            for waiter in self._waiters.pop(row, ()):
                waiter.left -= 1
                if waiter.left == 0:
                    waiter.then()

    def lost(self) -> list[Call[Any]]:
        """The connection is lost, and with it what was asked; the calls that waited, to be asked anew."""
        self._claimed.clear()
        self._again_at = None
        calls: dict[Call[Any], None] = {}
        for row, waiters in list(self._waiters.items()):
            calls.update((waiter.call, None) for waiter in waiters if waiter.call is not None)
            self._waiters[row] = [waiter for waiter in waiters if waiter.call is None]
            if not self._waiters[row]:
                del self._waiters[row]
        return list(calls)


def without_columns(part: Indices, failures: list[ColumnError], columns: Indices) -> tuple[Indices, list[ColumnError]]:
    """A part of a request and its failures, without some of its columns."""
    left = np.delete(np.arange(len(part)), columns)
    failures = [
        failure._replace(column=int(np.searchsorted(left, failure.column)))
        for failure in failures
        if failure.column in left
    ]
    return part[left], failures
