"""Streams as requests ask for them: pages of them, filtered and sorted, and each with what went through it lately."""

from __future__ import annotations

import asyncio
import base64
import heapq
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from instep.core.typing import F64, I64, U32
from instep.frontends.http import Subject
from instep.frontends.http.answers import HttpError, bad_request, meant
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks
from instep_client.protocol.codes import Place

STATES: Final = ("connected", "parked", "hibernating")
SORTS: Final = ("name", "rate", "idle", "seq", "pending")
MOST: Final = 500
USUAL: Final = 50
_SLICE: Final = 4096
"""Streams that are looked at before the loop gets its turn."""
_RECORDS: Final = 100
"""Records that are made before the loop gets its turn."""
_PAUSE_S: Final = 0.0005
"""The least time that the loop gets then."""
_EVENTS: Final = 100
"""Newest events of a stream that its record holds."""

Key: TypeAlias = tuple[float, str]
"""Sort key of a stream: the value that a page is sorted by (0 when sorted by name), and the name."""


@dataclass(frozen=True, slots=True)
class Query:
    """A choice of streams, and their order."""

    contains: str
    state: str
    sort: str
    """Behind a `-` where the order is turned round."""
    limit: int
    after: Key | None
    """Key of the last stream of the page before."""

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Query:
        """Parse the parameters of a request.

        Raises:
            HttpError: when a parameter has no such value.
        """
        sort, state, limit = parameters.get("sort", "name"), parameters.get("state", ""), parameters.get("limit", "")
        if sort.removeprefix("-") not in SORTS:
            raise bad_request(f"streams cannot be sorted by {sort!r:.40}", sort, SORTS)
        if state not in ("", *STATES):
            raise bad_request(f"no stream has the state {state!r:.40}", state, STATES)
        if limit and not (re.fullmatch(r"[0-9]{1,9}", limit) and 1 <= int(limit) <= MOST):
            raise HttpError(400, "BAD_REQUEST", f"limit is {limit!r:.40}: expected 1 to {MOST}")
        after = key_after(parameters.get("cursor"), sort)
        return cls(parameters.get("contains", ""), state, sort, int(limit or USUAL), after)


def cursor_behind(key: Key, sort: str) -> str:
    """The text that leads to the page behind a stream."""
    return base64.urlsafe_b64encode(json.dumps([sort, *key]).encode()).decode().rstrip("=")


def key_after(cursor: str | None, sort: str) -> Key | None:
    """The key of the last stream of the page before; None without a cursor.

    Raises:
        HttpError: when the cursor does not belong to a page with this order.
    """
    if cursor is None:
        return None
    try:
        match json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)):
            case [str(was), int(value) | float(value), str(name)] if was == sort:
                return value, name
    except (ValueError, RecursionError):
        pass
    raise HttpError(400, "BAD_CURSOR", "the cursor belongs to no page of this order: begin without one")


class Inspector:
    """Looks at the streams of a server, with tasks for what it measures for a while after a request."""

    def __init__(self, subject: Subject, tasks: Tasks) -> None:
        self._subject = subject
        self._tasks = tasks
        self._rates: dict[ModelService, FrameRates] = {}
        """Rates of services that were asked for lately; an entry does not keep an unloaded model in memory for long."""
        self._one_at_a_time = asyncio.Lock()

    def find(self, model: str) -> ModelService | None:
        """The model of that name, or None."""
        return next((service for service in self._subject.services if service.name == model), None)

    def service(self, model: str) -> ModelService:
        """The model that a request names, or the default one.

        Raises:
            HttpError: where there is none of that name.
        """
        if not model:
            return self._subject.services[0]
        if (service := self.find(model)) is None:
            names = [service.name for service in self._subject.services]
            raise HttpError(404, "UNKNOWN_MODEL", f"no model is called {model!r:.120}: {meant(model, names)}")
        return service

    async def page(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """One page; streams that come and go while it is made may be missing or be there.

        Returns:
            streams: records.
            total: open streams of the model, wherever they are.
            matched: those that the filters let through.
            cursor: of the next page; None after the last.

        Raises:
            HttpError: when a parameter has no such value.
        """
        query, service = Query.of(parameters), self.service(parameters.get("model", ""))
        async with self._one_at_a_time:
            keys, matched, has_more = await self._chosen(service, query)
            records: list[dict[str, Any]] = []
            for at, (_, name) in enumerate(keys):
                if at % _RECORDS == _RECORDS - 1:
                    await asyncio.sleep(_PAUSE_S)
                if (record := self._record(service, name)) is not None:
                    records.append(record)
        return {
            "model": service.name,
            "streams": records,
            "total": service.engine.table.open_count + len(service.operations.hibernation),
            "matched": matched,
            "cursor": cursor_behind(keys[-1], query.sort) if has_more else None,
        }

    async def _chosen(self, service: ModelService, query: Query) -> tuple[list[Key], int, bool]:
        """The keys of the page in order, the number of streams that the filters let through, and whether more follow.

        All streams are looked through, in slices between turns of the loop.
        """
        is_descending, after = query.sort.startswith("-"), query.after
        best: list[Key] = []
        matched = behind = 0
        async for keys in self._keys(service, query):
            known = {name for _, name in best}  # one that is there already has left memory since it was looked at
            keys = [key for key in keys if key[1] not in known]
            matched += len(keys)
            if after is not None:
                keys = [key for key in keys if (key < after if is_descending else key > after)]
            behind += len(keys)
            best = (heapq.nlargest if is_descending else heapq.nsmallest)(query.limit, best + keys)
        return best, matched, behind > query.limit

    async def _keys(self, service: ModelService, query: Query) -> AsyncIterator[list[Key]]:
        table, hibernation, sort = service.engine.table, service.operations.hibernation, query.sort.removeprefix("-")
        values: list[float]
        if query.state != "hibernating":
            is_parked = query.state == "parked" if query.state else None
            for first in range(0, len(table.owner), _SLICE):
                slots = table.open_between(first, first + _SLICE, parked=is_parked)
                match sort:
                    case "seq":
                        values = table.next_seq[slots].tolist()
                    case "pending":
                        values = table.unanswered[slots].tolist()
                    case "idle":  # since when, the latest first
                        values = (-np.where(table.unanswered[slots] > 0, 2**62, table.last_active_ns[slots])).tolist()
                    case "rate" if (rates := self._rates_of(service).of(slots)) is not None:
                        values = rates.tolist()
                    case _:
                        values = [0] * len(slots)
                yield _named(query, zip(values, table.names(slots), strict=True))
                await asyncio.sleep(_PAUSE_S)
        if query.state in ("", "hibernating"):
            sleepers = list(hibernation)
            for first in range(0, len(sleepers), _SLICE):
                asleep = [(name, hibernation[name]) for name in sleepers[first : first + _SLICE] if name in hibernation]
                usual = -1 if sort == "seq" else 0
                keys = ((-sleeper.since_ns if sort == "idle" else usual, name) for name, sleeper in asleep)
                yield _named(query, keys)
                await asyncio.sleep(_PAUSE_S)

    def record(self, service: ModelService, name: str) -> dict[str, Any] | None:
        """A stream with its newest events, or None."""
        if (record := self._record(service, name)) is None:
            return None
        return record | {"events": [event._asdict() for event in service.events.since(0, name)[-_EVENTS:]]}

    def _record(self, service: ModelService, name: str) -> dict[str, Any] | None:
        rates, stream = self._rates_of(service), service.listing.find(name, time.monotonic_ns())
        if stream is None:
            return None
        rate: float | None = 0.0
        if stream.place is not Place.HIBERNATING:
            measured = rates.of(service.engine.table.find([name]))
            rate = None if measured is None else round(float(measured[0]), 3)
        return {
            "name": name,
            "state": stream.place.name.lower(),
            "owner": stream.owner,
            "seq": stream.next_seq,
            "rate": rate,
            "pending": stream.pending,
            "idle_s": _seconds(stream.idle_ns),
            "expires_in_s": None if stream.expires_in_ns is None else _seconds(stream.expires_in_ns),
            "parked_s": _seconds(stream.silent_ns) if stream.owner is None else None,
        }

    def _rates_of(self, service: ModelService) -> FrameRates:
        if (rates := self._rates.get(service)) is None:
            rates = self._rates[service] = FrameRates(service, self._tasks, lambda: self._rates.__delitem__(service))
        rates.want()
        return rates


def _named(query: Query, keys: Iterable[Key]) -> list[Key]:
    return [key for key in keys if query.contains in key[1]]


def _seconds(time_ns: int) -> float:
    return round(time_ns / 1e9, 3)


class FrameRates:
    """Frames per second of each stream of a service, over the last second or two; measured only while wanted.

    `forget` is called when they are wanted no more.
    """

    _EVERY_S: Final = 1.0
    _LEAST_NS: Final = 500_000_000
    _WANTED_S: Final = 10.0
    """Rates are measured for this long after each request for them."""

    def __init__(self, service: ModelService, tasks: Tasks, forget: Callable[[], None]) -> None:
        self._tasks = tasks
        self._forget = forget
        self._table = service.engine.table
        self._samples: list[tuple[int, I64, U32]] = []
        """At most the two newest: when, and the seqs and the incarnations of all slots."""
        self._wanted_until_s = 0.0
        self._is_sampling = False

    def want(self) -> None:
        """Measure for a while from now on."""
        self._wanted_until_s = time.monotonic() + self._WANTED_S
        if not self._is_sampling:
            self._is_sampling = True
            self._tasks.start(self._sample())

    def of(self, slots: I64) -> F64 | None:
        """Rates of open streams, float64 [N]; None before they were measured for half a second."""
        if not self._samples or (passed_ns := time.monotonic_ns() - self._samples[0][0]) < self._LEAST_NS:
            return None
        (_, seqs, incarnations), table = self._samples[0], self._table
        is_same = incarnations[slots] == table.incarnations(slots)
        before = np.where(is_same, seqs[slots], table.first_seq[slots])  # another one was opened since
        rates: F64 = np.maximum(table.next_seq[slots] - before, 0) * 1e9 / passed_ns
        return rates

    async def _sample(self) -> None:
        table, every = self._table, np.arange(len(self._table.owner))
        try:
            while time.monotonic() < self._wanted_until_s:
                sample = time.monotonic_ns(), table.next_seq.copy(), table.incarnations(every)
                self._samples = [*self._samples[-1:], sample]
                await asyncio.sleep(self._EVERY_S)
        finally:
            self._forget()
