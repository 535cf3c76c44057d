"""Streams as requests ask for them: pages of them, filtered and sorted, and each with what went through it lately."""

from __future__ import annotations

import asyncio
import base64
import heapq
import json
import math
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from instep.core.tables import SCRATCH_SLOT, WINDOW, rows_of
from instep.core.typing import F64, I64, U8, U32
from instep.frontends.http import Subject
from instep.frontends.http.answers import HttpError, bad_request, meant
from instep.models.base import StateSpec
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

    prefix: str
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
        names = parameters.get("prefix", ""), parameters.get("contains", "")
        return cls(*names, state, sort, int(limit or USUAL), key_after(parameters.get("cursor"), sort))


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
        self._traces = Traces(self.find, tasks)
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
        """A stream with its trace and its newest events, or None; it is sampled from now on."""
        if (record := self._record(service, name)) is None:
            return None
        return {
            **record,
            "trace": self._traces.of(service.name, name),
            "events": [event._asdict() for event in service.events.since(0, name)[-_EVENTS:]],
        }

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
    if not query.prefix and not query.contains:
        return list(keys)
    return [key for key in keys if key[1].startswith(query.prefix) and query.contains in key[1]]


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


class _TracedFrame(NamedTuple):
    time_s: float
    seq: int
    inputs: list[float]
    outputs: list[float]
    state_norm: float | None


@dataclass(slots=True)
class _Trace:
    until_s: float
    samples: deque[_TracedFrame] = field(default_factory=lambda: deque(maxlen=240))


class Traces:
    """Samples of the streams that were asked for lately: one of each now and then.

    `find` gives the service of a name now, or None: a model may be swapped while a stream is looked at.
    """

    _EVERY_S: Final = 0.25
    _WATCHED_S: Final = 60.0
    """A stream is sampled for this long after each request for it."""
    _MOST_STREAMS: Final = 32
    """Beyond it, those that were asked for least recently are forgotten."""
    _MOST_STATE_BYTES: Final = 1024 * 1024
    """Larger states are not read: it would take too long while everything else waits."""
    _VALUES: Final = 4
    """Count of leading values of a frame and of an output that a sample holds."""

    def __init__(self, find: Callable[[str], ModelService | None], tasks: Tasks) -> None:
        self._find = find
        self._tasks = tasks
        self._traces: dict[tuple[str, str], _Trace] = {}
        """By model and stream, the one that was asked for least recently first."""
        self._is_sampling = False

    def of(self, model: str, stream: str) -> dict[str, list[Any]]:
        """The samples of a stream so far, as columns; it is sampled for a while from now on."""
        trace = self._traces.pop((model, stream), None) or _Trace(0.0)
        trace.until_s = time.monotonic() + self._WATCHED_S
        self._traces[model, stream] = trace
        if len(self._traces) > self._MOST_STREAMS:
            del self._traces[next(iter(self._traces))]
        if not self._is_sampling:
            self._is_sampling = True
            self._tasks.start(self._sample_all())
        return {name: [getattr(sample, name) for sample in trace.samples] for name in _TracedFrame._fields}

    async def _sample_all(self) -> None:
        try:
            while self._traces:
                for (model, stream), trace in list(self._traces.items()):
                    if time.monotonic() > trace.until_s:
                        self._traces.pop((model, stream), None)
                    elif (service := self._find(model)) is not None:
                        await self._sample(service, stream, trace.samples)
                await asyncio.sleep(self._EVERY_S)
        finally:
            self._is_sampling = False

    async def _sample(self, service: ModelService, name: str, samples: deque[_TracedFrame]) -> None:
        """Look at the newest frame of a stream, if there is one that was not looked at."""
        table, tables = service.engine.table, service.engine.tables
        slots = table.find([name])
        slot = int(slots[0])
        newest = int(table.step_seq[slot]) - 1
        if slot == SCRATCH_SLOT or newest < table.first_seq[slot] or (samples and samples[-1].seq == newest):
            return
        norm = None
        if service.states.spec.row_bytes <= self._MOST_STATE_BYTES:
            seqs, states, lost = await service.states.read(slots)  # between two of its steps
            if lost[0] or table.find([name])[0] != slot:
                return
            newest, norm = int(seqs[0]) - 1, _norm(service.states.spec, states)
        if table.next_seq[slot] - newest > tables.counts[WINDOW]:
            return  # its place in the frame buffer holds the inputs of a frame that waits
        row = int(rows_of(tables, slots, np.array([newest]))[0])
        inputs, outputs = (
            [float(f"{value:.6g}") for value in values[row, : self._VALUES].tolist()] for values in (tables.x, tables.y)
        )
        samples.append(_TracedFrame(round(time.time(), 3), newest, inputs, outputs, norm))


def _norm(spec: StateSpec, states: U8) -> float | None:
    """Euclidean norm of all floats of a state, [1, row_bytes]."""
    floats = [leaf for leaf in spec.unpack(states).values() if leaf.dtype.kind == "f"]
    squares = sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in floats)
    return float(f"{math.sqrt(squares):.6g}") if floats else None
