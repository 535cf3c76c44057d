"""The admin server as the life of a process sees it: it starts, says goodbye, and closes."""

from __future__ import annotations

import socket

import anyio
import structlog

from instep.config.endpoint import is_loopback_host
from instep.frontends.http import Subject
from instep.frontends.http.app import make_app
from instep.frontends.http.connections import Connections, url_of
from instep.frontends.http.events import Events
from instep.frontends.http.inspector import Inspector
from instep.frontends.http.metrics import exposition
from instep.frontends.http.security import Guard
from instep.frontends.http.status import ServerStatus
from instep.streaming.tasks import Tasks


class AdminServer:
    """Serves what it sees of a server, which has its models, over HTTP.

    The listener is bound and listening, and closed with this. Requests have to show the token, where there is one.
    """

    def __init__(
        self, listener: socket.socket, token: str | None, subject: Subject, log: structlog.stdlib.BoundLogger
    ) -> None:
        host, port = listener.getsockname()[:2]
        self.url = url_of(listener)
        self._tasks = Tasks(lambda error: log.error("bug in the admin server", exc_info=error))
        status, inspector = ServerStatus(subject), Inspector(subject, self._tasks)
        self._events = Events(status, inspector, self._tasks)
        app = make_app(subject, status, inspector, self._events, log)
        # What is slow the first time only, before anybody waits for the loop.
        anyio.get_cancelled_exc_class()
        list(exposition(subject.services))
        self._connections = Connections(listener, Guard(app, token, is_loopback_host(host), port))

    @property
    def is_active(self) -> bool:
        """Whether it does more than to wait for requests: somebody listens, or did so or looked at streams lately."""
        return bool(len(self._tasks))

    async def start(self) -> None:
        """Answer from now on."""
        await self._connections.start()

    def go_away(self) -> None:
        """Say goodbye to those who listen, because the server ends; requests are answered until `close`."""
        self._events.close()

    async def close(self) -> None:
        """End every connection."""
        self._events.close()
        self._tasks.cancel()
        await self._connections.close()
