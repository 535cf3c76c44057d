"""Streams as requests ask for them: pages of them, and each by itself with what went through it lately."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from instep.frontends.http import Subject
from instep.frontends.http.answers import HttpError, bad_request, meant
from instep.frontends.http.listing import MOST, SORTS, STATES, USUAL, Query, after_of, page
from instep.frontends.http.records import FrameRates, record_of
from instep.frontends.http.traces import Traces
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks

_EVENTS: Final = 100
"""Of a stream that are shown."""
_MOST_COMPARED: Final = 500
"""Names that a wrong one is compared with; more take too long."""
_COMPARED: Final = 20
"""Of them, those that are compared before the loop gets its turn."""


class Inspector:
    """Looks at the streams of a server, with tasks for what it measures for a while after a request."""

    def __init__(self, subject: Subject, tasks: Tasks) -> None:
        self._subject = subject
        self._tasks = tasks
        self._rates: dict[ModelService, FrameRates] = {}
        """Of services that were asked for lately; a model that was unloaded is not kept by it."""
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
        """A page of streams; see `listing.page`.

        Raises:
            HttpError: when a parameter has no such value.
        """
        query, service = _query(parameters), self.service(parameters.get("model", ""))
        rates = self._rates_of(service)
        async with self._one_at_a_time:
            return await page(service, rates, query)

    def record(self, service: ModelService, name: str) -> dict[str, Any] | None:
        """A stream with its trace and its newest events, or None; it is sampled from now on."""
        record = record_of(service, self._rates_of(service), name)
        if record is None:
            return None
        return {
            **record,
            "trace": self._traces.of(service.name, name),
            "events": [event._asdict() for event in service.events.since(0, name)[-_EVENTS:]],
        }

    async def no_stream(self, service: ModelService, name: str) -> HttpError:
        """That there is no stream of that name."""
        table = service.engine.table
        names = table.names(table.open_slots()) if table.open_count <= _MOST_COMPARED else []
        close: list[str] = []
        for first in range(0, len(names), _COMPARED):
            close = get_close_matches(name[:200], close + names[first : first + _COMPARED], n=1)
            await asyncio.sleep(0)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        return HttpError(404, "UNKNOWN_STREAM", f"{service.name!r} has no stream {name!r:.200}{meant}")

    def _rates_of(self, service: ModelService) -> FrameRates:
        if (rates := self._rates.get(service)) is None:
            rates = self._rates[service] = FrameRates(service, self._tasks, lambda: self._rates.__delitem__(service))
        rates.want()
        return rates


def _query(parameters: Mapping[str, str]) -> Query:
    sort, state, limit = parameters.get("sort", "name"), parameters.get("state", ""), parameters.get("limit", "")
    if sort.removeprefix("-") not in SORTS:
        raise bad_request(f"streams cannot be sorted by {sort!r:.40}", sort, SORTS)
    if state not in ("", *STATES):
        raise bad_request(f"no stream has the state {state!r:.40}", state, STATES)
    if limit and not (re.fullmatch(r"[0-9]{1,9}", limit) and 1 <= int(limit) <= MOST):
        raise HttpError(400, "BAD_REQUEST", f"limit is {limit!r:.40}: expected 1 to {MOST}")
    return Query(
        parameters.get("prefix", ""),
        parameters.get("contains", ""),
        state,
        sort.removeprefix("-"),
        sort.startswith("-"),
        int(limit or USUAL),
        after_of(parameters.get("cursor"), sort),
    )
