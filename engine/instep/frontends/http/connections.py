"""The socket of the admin server and its connections, in the event loop of the server, from bind to close."""

from __future__ import annotations

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from instep.config import HttpConfig
from instep.config.endpoint import host_and_port, is_loopback_host
from instep.frontends import CannotListen
from instep.frontends.http.answers import HttpError

DEFAULT: Final = HttpConfig().endpoint
MOST_CONNECTIONS: Final = 64
MOST_OF_ONE_ADDRESS: Final = 24
"""Connections; fewer than the listeners that events may have, so that one address cannot take all of these either."""
MOST_HEAD_BYTES: Final = 16_384
"""Of a request's line and headers, to within a piece."""
_PIECE_BYTES: Final = 1024
"""Bytes that the parser gets at once: it looks at the size of a head only while a part of it is missing."""
_KEEP_ALIVE_S: Final = 30
_LINGER_S: Final = 0.5
"""Time that answers under way may take when the server ends."""
_BACKLOG: Final = 128


def bind(config: HttpConfig, log: structlog.stdlib.BoundLogger, default: str | None = DEFAULT) -> socket.socket | None:
    """A socket that listens, or None where there is to be no admin server.

    That the endpoint `default` is in use is told to the log: another server on this machine has it, and that is no
    reason not to serve.

    Raises:
        CannotListen: when an endpoint that was asked for cannot be had.
    """
    if config.endpoint is None:
        return None
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


def cannot_listen(endpoint: str, error: OSError) -> CannotListen:
    """Why an endpoint cannot be bound, and what to do."""
    return CannotListen(
        f"the admin server cannot listen at http.endpoint {endpoint}: {error.strerror}; choose another port (--http "
        "127.0.0.1:0 takes a free one), or none (--http off)"
    )


def url_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:5780`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connections:
    """The connections of a socket that is bound, answered by an application.

    Args:
        listener: bound and listening; closed with this.
        app: answers; it raises nothing.
        request_s: a connection may take that long for the head of a request.
        unread_s: a peer may leave what was sent to it for that long, before its connection is ended.
    """

    def __init__(
        self, listener: socket.socket, app: ASGIApp, *, request_s: float = 10.0, unread_s: float = 10.0
    ) -> None:
        self._listener = listener
        self._config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        )
        self._request_s = request_s
        self._unread_s = unread_s
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Answer from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._config, self._state, loop, self._request_s, self._unread_s),
            sock=self._listener,
            backlog=_BACKLOG,
        )

    async def close(self) -> None:
        """Accept no more, give the answers under way a moment, and end every connection."""
        if self._server is not None:
            self._server.close()
        self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_LINGER_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)


_SILENT: Final = logging.Logger("uvicorn", logging.CRITICAL)
"""Takes what uvicorn says of requests that are not HTTP; the application logs everything else."""
_SILENT.addHandler(logging.NullHandler())


class _Connection(H11Protocol):
    """A connection that is bounded in number, in the time for a request, and in what its peer leaves unread."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        request_s: float,
        unread_s: float,
    ) -> None:
        super().__init__(config, state, {}, loop)
        self._request_s = request_s
        self._unread_s = unread_s
        self.logger, self.access_log = _SILENT, False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        address = (transport.get_extra_info("peername") or ("",))[0]
        clients = [each.client for each in self.connections if isinstance(each, _Connection)]
        of_address = sum(client is not None and client[0] == address for client in clients)
        if len(self.connections) < MOST_CONNECTIONS and of_address < MOST_OF_ONE_ADDRESS:
            super().connection_made(transport)
            self._expect_head()
            return
        self.transport = transport
        is_of_address = of_address >= MOST_OF_ONE_ADDRESS
        has = f"{of_address} connections from this address" if is_of_address else f"{MOST_CONNECTIONS} connections"
        sentence = f"the admin server has {has} already: close one, and try again"
        self._end(HttpError(503, "TOO_MANY_CONNECTIONS", sentence))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if self in self.connections:
            super().connection_lost(exc)
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    def data_received(self, data: bytes) -> None:
        for first in range(0, len(data), _PIECE_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[first : first + _PIECE_BYTES])
        if self._is_answering:
            self._end_head()
        elif self._head_timer is None:  # the rest of a head is still to come
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self._unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        if self._is_answering:  # it is in the body: the application's answer must not come behind this one
            self.cycle.disconnected = True
            if self.cycle.response_started:
                self.transport.abort()
                return
        sentence = f"this is not an HTTP/1.1 request whose line and headers have at most {MOST_HEAD_BYTES} bytes"
        self._end(HttpError(400, "BAD_REQUEST", sentence))

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._request_s, self.transport.abort)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self, error: HttpError) -> None:
        """Answer without the application, and close."""
        body = bytes(error.response().body)
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
