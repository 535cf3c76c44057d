"""Server-sent events: the statistics every second, the log of streams as it grows, and one watched stream.

All listeners get the same object of statistics. Only the listener's position in the log is stored. One that stops
reading costs one socket buffer until its connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from instep.frontends.http.answers import HttpError, to_json
from instep.frontends.http.status import ServerStatus
from instep.frontends.http.streams import Inspector
from instep.streaming.tasks import Tasks

MOST_LISTENERS: Final = 32
_EVERY_S: Final = 0.25
_TURNS: Final = 4
"""The log is sent this many times as often as the statistics."""
_AT_ONCE: Final = 64
"""Events of the log that are sent before the loop gets its turn."""
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
_TYPE: Final = "text/event-stream"


class Events:
    """All listeners, and the one task that wakes them."""

    def __init__(self, status: ServerStatus, inspector: Inspector, tasks: Tasks) -> None:
        self._status = status
        self._inspector = inspector
        self._tasks = tasks
        self._listeners = 0
        self._stats = b""
        self._turn = 0
        self._next_turn: asyncio.Event = asyncio.Event()
        self._is_running = self._is_over = False

    def listen(self, request: Request) -> Response:
        """Answer with events from now on, or since `Last-Event-ID`.

        Raises:
            HttpError: if there is no such model, or too many listeners.
        """
        service = self._inspector.service(request.query_params.get("model", ""))
        if request.method == "HEAD":
            return Response(headers=_HEADERS, media_type=_TYPE)
        if self._is_over:
            raise HttpError(503, "SHUTTING_DOWN", "the server is shutting down")
        if self._listeners >= MOST_LISTENERS:
            sentence = f"{MOST_LISTENERS} programs listen to events already: close a page, or ask for /api/stats"
            raise HttpError(503, "TOO_MANY_LISTENERS", sentence, {"retry-after": "5"})
        text = request.headers.get("last-event-id", "")
        said = int(text[:18]) if text.isascii() and text.isdigit() else service.events.newest
        return _Listener(self, self._tell(service.name, request.query_params.get("stream"), said))

    def close(self) -> None:
        """Send `bye` to all listeners."""
        self._is_over = True
        self._wake()

    def joined(self) -> None:
        """Count a new listener."""
        self._listeners += 1
        if not self._is_running:
            self._is_running = True
            self._tasks.start(self._run())

    def left(self) -> None:
        """Forget a listener."""
        self._listeners -= 1

    async def _run(self) -> None:
        try:
            while self._listeners and not self._is_over:
                if self._turn % _TURNS == 0:
                    self._stats = _event("stats", self._status.stats())
                self._turn += 1
                self._wake()
                await asyncio.sleep(_EVERY_S)
        finally:
            self._is_running, self._stats, self._turn = False, b"", 0

    def _wake(self) -> None:
        self._next_turn.set()
        self._next_turn = asyncio.Event()

    async def _tell(self, model: str, stream: str | None, said: int) -> AsyncIterator[bytes]:
        told = b""
        yield b": events of instep\n\n"
        while True:
            next_turn = self._next_turn  # taken before the look: one that comes meanwhile is not waited for
            if self._is_over or (found := self._inspector.find(model)) is None:
                break
            if self._stats != told:
                told = self._stats
                yield told
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
            await next_turn.wait()
        yield _event("bye", b"{}")


class _Listener(StreamingResponse):
    """The answer to a listener, which counts as open while it lasts."""

    def __init__(self, events: Events, body: AsyncIterator[bytes]) -> None:
        super().__init__(body, headers=_HEADERS, media_type=_TYPE)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._events.joined()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.left()


def _event(kind: str, data: bytes, number: int | None = None) -> bytes:
    head = f"event: {kind}\n" if number is None else f"event: {kind}\nid: {number}\n"
    return b"%sdata: %s\n\n" % (head.encode(), data)
