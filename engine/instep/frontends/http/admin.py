"""The admin server: its socket and connections, from bind to close, in the event loop of the server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from instep.config import HttpConfig
from instep.config.endpoint import host_and_port, is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http import WatchedServer
from instep.frontends.http.app import make_app
from instep.frontends.http.events import Events
from instep.frontends.http.metrics import exposition
from instep.frontends.http.security import DEFAULT, KEPT_FOR_HEALTH, MOST_REQUESTS, Guard, cannot_listen
from instep.frontends.http.status import ServerStatus
from instep.frontends.http.streams import Inspector

MOST_CONNECTIONS: Final = MOST_REQUESTS + KEPT_FOR_HEALTH
MOST_HEAD_BYTES: Final = 16_384
"""The size limit of a request's line and headers while they are incomplete."""
_LINGER_S: Final = 0.5
"""The time for answers under way when the server ends."""
_BACKLOG: Final = 128
_SEND_BUFFER_BYTES: Final = 65_536
"""Of the kernel, for a connection: without it, megabytes of events would be kept for a listener that takes none."""
_TAKES_NOTHING_S: Final = 10.0
"""On Linux a connection ends if its peer's machine takes nothing of what is to be sent to it for this long."""


def bind(
    config: HttpConfig, log: structlog.stdlib.BoundLogger, default: str | None = DEFAULT, path: Path | None = None
) -> socket.socket | None:
    """Make a listening socket; None if the configuration wants no admin server.

    It is a Unix socket if a `path` is given, for the admin server of all shards to ask it. If the endpoint `default` is
    in use, by another server on this machine, that is only logged, and None is returned.

    Raises:
        CannotListen: when an endpoint that was asked for cannot be bound.
    """
    if config.endpoint is None:
        return None
    if path is not None:
        return _bind_unix(path)
    host, port = host_and_port(config.endpoint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if config.token_file is None and not is_loopback_host(str(address[0])):
            raise CannotListen(
                f"http.endpoint {config.endpoint} leads to {address[0]}, which can be reached from other machines: use "
                "127.0.0.1:PORT, or name a file that holds a token in http.token_file"
            )
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise cannot_listen(config.endpoint, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_TAKES_NOTHING_S * 1000))
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        problem = cannot_listen(config.endpoint, error)
        if config.endpoint != default:
            raise problem from None
        log.warning("no admin server", reason=str(problem))
        return None
    return listener


def _bind_unix(path: Path) -> socket.socket:
    try:
        path.unlink(missing_ok=True)  # left by a server that was killed
        return socket.create_server(str(path), family=socket.AF_UNIX, backlog=_BACKLOG)
    except OSError as error:
        advice = "let TMPDIR name another folder, or leave it out (--http off)"
        raise CannotListen(f"the admin server cannot listen at {path}: {error}; {advice}") from None


def address(listener: socket.socket) -> tuple[str, str]:
    """The host at which a socket listens, and its URL; a Unix socket is at localhost, and no browser can open it."""
    if listener.family == socket.AF_UNIX:
        return "localhost", ""
    host, port = listener.getsockname()[:2]
    return host, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class AdminServer:
    """Shows a server and its models over HTTP.

    `close` closes the listener, too. Requests have to show one of the tokens, unless these are None.
    """

    def __init__(
        self,
        listener: socket.socket,
        tokens: Mapping[str, str] | None,
        server: WatchedServer,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        host, self.url = address(listener)
        status, inspector = ServerStatus(server), Inspector(server)
        self._events = Events(status, inspector)
        app = make_app(server, status, inspector, self._events, log)
        # What is slow the first time only, before anybody waits for the loop.
        anyio.get_cancelled_exc_class()
        list(exposition(server.services, {}))
        self._listener = listener
        self._guard = Guard(app, tokens, is_loopback_host(host))
        self._server = make_server(self._guard)

    async def start(self) -> None:
        """Answer requests from now on."""
        await self._server.startup(sockets=[self._listener])

    def admit(self, tokens: Mapping[str, str] | None) -> None:
        """Require one of these tokens from now on; where one was withdrawn, all listeners have to ask again."""
        if not {*(self._guard.tokens or {}).values()} <= {*(tokens or {}).values()}:
            self._events.end_listeners()
        self._guard.tokens = tokens

    def go_away(self) -> None:
        """Send goodbye to all listeners, because the server ends; requests are answered until `close`."""
        self._events.close()

    async def close(self) -> None:
        """End every connection, after a moment for answers under way."""
        self._events.close()
        await close_server(self._server, self._listener)


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A uvicorn server without signal handlers and logs; `startup` and `close_server` start and end it."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the application logs what matters
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan, server.servers = config.lifespan_class(config), []
    return server


async def close_server(server: uvicorn.Server, listener: socket.socket) -> None:
    """Accept nothing more, wait a moment for answers under way, and end every connection."""
    for each in server.servers:
        each.close()
    listener.close()
    connections, tasks = server.server_state.connections, server.server_state.tasks
    for connection in list(connections):
        connection.shutdown()
    if tasks:
        await asyncio.wait(tasks, timeout=_LINGER_S)
    for connection in list(connections):
        connection.transport.abort()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Connection(H11Protocol):
    """One of a limited number of connections; the one idle longest makes room for the next."""

    _silent_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent_since_s = self.loop.time()
        there = [each for each in self.connections if isinstance(each, _Connection) and not each.transport.is_closing()]
        if len(there) > MOST_CONNECTIONS:
            silent = [each for each in there if each.cycle is None or each.cycle.response_complete]
            min(silent, key=lambda each: each._silent_since_s).transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._silent_since_s = self.loop.time()
