"""Pages of streams, and single streams with their newest events, for HTTP requests."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from instep.frontends.http import WatchedServer
from instep.frontends.http.answers import HttpError, bad_request, meant
from instep.streaming.listing import StreamStatus
from instep.streaming.service import ModelService
from instep_client.protocol.codes import Place

STATES: Final = tuple(place.name.lower() for place in Place)
MOST: Final = 500
USUAL: Final = 50
_PAUSE_S: Final = 0.0005
"""The least time that the loop gets between two looks at the streams of a page."""
_EVENTS: Final = 100
"""The most events in the record of a stream."""


class Inspector:
    """Looks up the streams of a server."""

    def __init__(self, server: WatchedServer) -> None:
        self._server = server

    def find(self, model: str) -> ModelService | None:
        """The model of that name, or None."""
        return next((service for service in self._server.services if service.name == model), None)

    def service(self, model: str) -> ModelService:
        """The model that a request names, or the default one.

        Raises:
            HttpError: if there is no model of that name.
        """
        if not model:
            return self._server.services[0]
        if (service := self.find(model)) is None:
            names = [service.name for service in self._server.services]
            raise HttpError(404, "UNKNOWN_MODEL", f"no model is called {model!r:.120}: {meant(model, names)}")
        return service

    async def page(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """One page of `Listing`; streams that open or close meanwhile may be missing or included.

        Returns:
            streams: records.
            total: the number of open streams of the model, in memory or not.
            cursor: of the next page; None after the last.

        Raises:
            HttpError: when a parameter is invalid.
        """
        service, state = self.service(parameters.get("model", "")), parameters.get("state", "")
        if state not in ("", *STATES):
            raise bad_request(f"no stream has the state {state!r:.40}", state, STATES)
        limit, cursor = _number(parameters, "limit", USUAL, MOST), _number(parameters, "cursor", 0, 2**40)
        place, prefix = Place[state.upper()] if state else 0, parameters.get("prefix", "")

        def accepts(name: str) -> bool:
            return name.startswith(prefix)

        records: list[dict[str, Any]] = []
        while True:
            page = service.listing.page(cursor, limit - len(records), place, accepts, time.monotonic_ns())
            records += (_record(name, status) for name, status in page.streams)
            cursor = page.cursor
            if not cursor or len(records) == limit:
                break
            await asyncio.sleep(_PAUSE_S)
        total = service.engine.table.open_count + len(service.operations.hibernation)
        return {"model": service.name, "streams": records, "total": total, "cursor": cursor or None}

    def record(self, service: ModelService, name: str) -> dict[str, Any] | None:
        """A stream with its newest events, or None."""
        if (stream := service.listing.find(name, time.monotonic_ns())) is None:
            return None
        return _record(name, stream) | {
            "events": [event._asdict() for event in service.events.since(0, name)[-_EVENTS:]]
        }


def _number(parameters: Mapping[str, str], name: str, usual: int, most: int) -> int:
    text = parameters.get(name, str(usual))
    if not re.fullmatch(r"[0-9]{1,15}", text) or not min(usual, 1) <= int(text) <= most:
        raise HttpError(400, "BAD_REQUEST", f"{name} is {text!r:.40}: expected {min(usual, 1)} to {most}")
    return int(text)


def _record(name: str, stream: StreamStatus) -> dict[str, Any]:
    return {
        "name": name,
        "state": stream.place.name.lower(),
        "owner": stream.owner,
        "seq": stream.next_seq,
        "pending": stream.pending,
        "idle_s": _seconds(stream.idle_ns),
        "expires_in_s": None if stream.expires_in_ns is None else _seconds(stream.expires_in_ns),
        "parked_s": _seconds(stream.silent_ns) if stream.owner is None else None,
    }


def _seconds(time_ns: int) -> float:
    return round(time_ns / 1e9, 3)
