"""Pages of streams, filtered and sorted: all of them are looked through, in slices between turns of the loop."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.frontends.http.answers import HttpError
from instep.frontends.http.records import PAUSE_S, SLICE, FrameRates, record_of
from instep.streaming.service import ModelService

STATES: Final = ("connected", "parked", "hibernating")
SORTS: Final = ("name", "rate", "idle", "seq", "pending")
MOST: Final = 500
USUAL: Final = 50
_NAMES: Final = 4096
"""Names that are looked at before the loop gets its turn."""
_RECORDS: Final = 100
"""Records that are made before the loop gets its turn."""
_ASLEEP: Final = 2**40
"""Added to the number of a stream that hibernates: it comes behind those in memory, whose numbers are their slots."""

Key: TypeAlias = tuple[int, int] | str
"""The sort key of a page, ascending: value and number of a stream, or its name."""


@dataclass(frozen=True, slots=True)
class Query:
    """A choice of streams, and their order."""

    prefix: str = ""
    contains: str = ""
    state: str = ""
    sort: str = "name"
    is_descending: bool = False
    limit: int = USUAL
    after: Key | None = None
    """Of the last stream of the page before."""

    @property
    def text_of_sort(self) -> str:
        """As it is written in a request."""
        return f"-{self.sort}" if self.is_descending else self.sort

    def cursor(self, last: Key) -> str:
        """The text that leads to the page behind a stream."""
        key = [last] if isinstance(last, str) else list(last)
        return base64.urlsafe_b64encode(json.dumps([self.text_of_sort, *key]).encode()).decode().rstrip("=")


def after_of(cursor: str | None, sort: str) -> Key | None:
    """The key of the last stream of the page before; None without a cursor.

    Raises:
        HttpError: when it is none of a page that was sorted so.
    """
    if cursor is None:
        return None
    try:
        was, *key = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        match key:
            case [str(name)] if was == sort and sort.lstrip("-") == "name":
                return name
            case [int(value), int(number)] if was == sort and max(abs(value), abs(number)) < 2**63:
                return value, number
    except (ValueError, TypeError, RecursionError):
        pass
    raise HttpError(400, "BAD_CURSOR", "the cursor belongs to no page of this order: begin without one")


async def page(service: ModelService, rates: FrameRates, query: Query) -> dict[str, Any]:
    """One page; streams that come and go while it is made may be missing or be there.

    Returns:
        streams: records.
        total: open streams of the model, wherever they are.
        matched: those that the filters let through.
        cursor: of the next page; None after the last.
    """
    best = _Best(query)
    if query.state != "hibernating":
        await _look_in_memory(service, rates, query, best)
    if query.state in ("", "hibernating"):
        await _look_at_sleepers(service, query, best)
    records: list[dict[str, Any]] = []
    last: Key | None = None
    for at, (last, name) in enumerate(best.streams):  # noqa: B007
        if at % _RECORDS == _RECORDS - 1:
            await asyncio.sleep(PAUSE_S)
        if (record := record_of(service, rates, name)) is not None:
            records.append(record)
    return {
        "model": service.name,
        "streams": records,
        "total": service.engine.table.open_count + len(service.operations.hibernation),
        "matched": best.matched,
        "cursor": query.cursor(last) if last is not None and best.left > query.limit else None,
    }


async def _look_in_memory(service: ModelService, rates: FrameRates, query: Query, best: _Best) -> None:
    table = service.engine.table
    step = _NAMES if query.sort == "name" or query.prefix or query.contains else SLICE
    for first in range(0, len(table.owner), step):
        slots = table.open_between(first, first + step, parked=query.state == "parked" if query.state else None)
        names: list[str] = []
        if step == _NAMES:
            names = table.names(slots)
            if query.prefix or query.contains:
                chosen = [at for at, name in enumerate(names) if _is_named(query, name)]
                slots, names = slots[chosen], [names[at] for at in chosen]
        if query.sort == "name":
            best.add_names(names)
        else:
            best.add_values(_values(service, rates, query, slots), slots, table.name)
        await asyncio.sleep(PAUSE_S)


def _values(service: ModelService, rates: FrameRates, query: Query, slots: I64) -> I64:
    """The sort keys of streams, rising: int64 [N]."""
    table = service.engine.table
    match query.sort:
        case "seq":
            values = table.next_seq[slots]
        case "pending":
            values = table.unanswered[slots].astype(np.int64)
        case "idle":  # since when, the latest first
            values = -np.where(table.unanswered[slots] > 0, 2**62, table.last_active_ns[slots])
        case _:
            found = rates.of(slots)
            values = np.zeros(len(slots), np.int64) if found is None else (found * 1e6).astype(np.int64)
    return -values if query.is_descending else values


async def _look_at_sleepers(service: ModelService, query: Query, best: _Best) -> None:
    hibernation = service.operations.hibernation
    sleepers = list(hibernation)
    for first in range(0, len(sleepers), _NAMES):
        names = [name for name in sleepers[first : first + _NAMES] if _is_named(query, name)]
        if query.sort == "name":
            best.add_names(names)
        else:
            found = {name: asleep for name in names if (asleep := hibernation.get(name)) is not None}
            numbers: I64 = _ASLEEP + np.array([asleep.stream for asleep in found.values()], np.int64)
            values: I64 = np.full(len(found), -1 if query.sort == "seq" else 0, np.int64)
            if query.sort == "idle":
                values = -np.array([asleep.since_ns for asleep in found.values()], np.int64)
            by_number = dict(zip(numbers.tolist(), found, strict=True))
            best.add_values(-values if query.is_descending else values, numbers, by_number.__getitem__)
        await asyncio.sleep(PAUSE_S)


def _is_named(query: Query, name: str) -> bool:
    return name.startswith(query.prefix) and query.contains in name


class _Best:
    """The first streams behind the cursor, in order; of equal values, those with smaller numbers."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self.streams: list[tuple[Key, str]] = []
        """Keys and names; never more than a page."""
        self.matched = 0
        self.left = 0
        """Behind the cursor."""

    def add_names(self, names: list[str]) -> None:
        """Streams that are sorted by these names, in any order."""
        fresh = set(names).difference(name for _, name in self.streams)
        self.matched += len(fresh)
        after, is_descending = self._query.after, self._query.is_descending
        if isinstance(after, str):
            fresh = {name for name in fresh if (name < after if is_descending else name > after)}
        self.left += len(fresh)
        if len(self.streams) == self._query.limit:  # most come behind the page: no need to sort them all
            last = self.streams[-1][1]
            fresh = {name for name in fresh if (name > last if is_descending else name < last)}
        self._keep([(name, name) for name in fresh], is_descending=is_descending)

    def add_values(self, values: I64, numbers: I64, name_of: Callable[[int], str]) -> None:
        """Streams that are sorted by values and rising numbers, int64 [N]."""
        self.matched += len(values)
        if isinstance(self._query.after, tuple):
            value, number = self._query.after
            is_behind = (values > value) | ((values == value) & (numbers > number))
            values, numbers = values[is_behind], numbers[is_behind]
        self.left += len(values)
        limit = self._query.limit
        if len(values) > limit:  # only a few of them can be on the page: no need to name and sort them all
            kth = np.partition(values, limit - 1)[limit - 1]
            is_first = values < kth
            is_first[np.flatnonzero(values == kth)[: limit - int(is_first.sum())]] = True
            values, numbers = values[is_first], numbers[is_first]
        known = {name for _, name in self.streams}
        named = zip(zip(values.tolist(), numbers.tolist(), strict=True), map(name_of, numbers.tolist()), strict=True)
        fresh: list[tuple[Key, str]] = [(key, name) for key, name in named if name not in known]
        # One that is on the page already has left memory since it was looked at.
        self.matched -= len(values) - len(fresh)
        self.left -= len(values) - len(fresh)
        self._keep(fresh)

    def _keep(self, streams: list[tuple[Key, str]], *, is_descending: bool = False) -> None:
        self.streams = sorted(self.streams + streams, reverse=is_descending)[: self._query.limit]
