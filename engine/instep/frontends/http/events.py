"""Server-sent events: the statistics every second, the log of streams as it grows, and one watched stream.

Only a listener's position in the log is stored. One that stops reading costs one socket buffer until its connection is
closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from instep.frontends.http.answers import HttpError, to_json
from instep.frontends.http.status import ServerStatus
from instep.frontends.http.streams import Inspector

MOST_LISTENERS: Final = 32
_EVERY_S: Final = 0.25
_TURNS: Final = 4
"""The log is sent this many times as often as the statistics."""
_AT_ONCE: Final = 64
"""The number of log events sent before the loop gets its turn."""
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
_TYPE: Final = "text/event-stream"


class Events:
    """All listeners of server-sent events."""

    def __init__(self, status: ServerStatus, inspector: Inspector) -> None:
        self._status = status
        self._inspector = inspector
        self._listeners = 0
        self._is_over = asyncio.Event()

    def listen(self, request: Request) -> Response:
        """Answer with events from now on, or since `Last-Event-ID`.

        Raises:
            HttpError: if there is no such model, or too many listeners.
        """
        service = self._inspector.service(request.query_params.get("model", ""))
        if request.method == "HEAD":
            return Response(headers=_HEADERS, media_type=_TYPE)
        if self._is_over.is_set():
            raise HttpError(503, "SHUTTING_DOWN", "the server is shutting down")
        if self._listeners >= MOST_LISTENERS:
            sentence = f"{MOST_LISTENERS} programs listen to events already: close a page, or ask for /api/stats"
            raise HttpError(503, "TOO_MANY_LISTENERS", sentence, {"retry-after": "5"})
        text = request.headers.get("last-event-id", "")
        said = int(text[:18]) if text.isascii() and text.isdigit() else service.events.newest
        body = self._tell(service.name, request.query_params.get("stream"), said, self._is_over)
        return StreamingResponse(body, headers=_HEADERS, media_type=_TYPE)

    def close(self) -> None:
        """Send `bye` to all listeners."""
        self._is_over.set()

    def end_listeners(self) -> None:
        """Send `bye` to the present listeners; they may come again."""
        self._is_over.set()
        self._is_over = asyncio.Event()

    async def _tell(self, model: str, stream: str | None, said: int, is_over: asyncio.Event) -> AsyncIterator[bytes]:
        self._listeners += 1
        try:
            for turn in count():
                if is_over.is_set() or (found := self._inspector.find(model)) is None:
                    break
                if turn % _TURNS == 0:
                    yield _event("stats", self._status.stats())
                    if stream is not None:
                        record = self._inspector.record(found, stream) or {"name": stream, "state": "closed"}
                        yield _event("stream", to_json(record))
                log = found.events
                if said > log.newest:  # a number of a former server, or of a former version of the model
                    said = 0
                events = log.since(said) if said < log.newest else []
                for first in range(0, len(events), _AT_ONCE):
                    part = events[first : first + _AT_ONCE]
                    said = part[-1].number
                    yield b"".join(_event("log", to_json(event._asdict()), event.number) for event in part)
                    await asyncio.sleep(0)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_EVERY_S):
                        await is_over.wait()
            yield _event("bye", b"{}")
        finally:
            self._listeners -= 1


def _event(kind: str, data: bytes, number: int | None = None) -> bytes:
    head = f"event: {kind}\n" if number is None else f"event: {kind}\nid: {number}\n"
    return b"%sdata: %s\n\n" % (head.encode(), data)
