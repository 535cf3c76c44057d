"""How many connections there may be, and what ends them; over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from instep.config import HttpConfig
from instep.frontends.http.admin import bind, close_server, make_server
from instep.frontends.http.security import Guard
from tests.support.admin import administered, connect, raw
from tests.support.running import log_into

ASK = b"GET /healthz HTTP/1.0\r\nhost: localhost\r\n\r\n"


async def test_connections_that_ask_for_nothing_fail_no_health_check() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        url = server.admin.url
        slow = [await connect(url) for _ in range(100)]
        for _, writer in slow[::2]:
            writer.write(b"GET /readyz HTTP/1.1\r\nhost: local")
        for path in ("/healthz", "/readyz", "/api/stats"):
            assert (await http.get(path)).status_code == 200
        assert await asyncio.wait_for(slow[0][0].read(), 10) == b""  # those that have been there for longest made room
        slow[-1][1].write(ASK)
        assert b"200 OK" in await asyncio.wait_for(slow[-1][0].read(), 10)
        for _, writer in slow:
            writer.close()


async def test_requests_under_way_are_bounded_and_leave_places_for_health() -> None:
    is_over = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await is_over.wait()
        await Response("done")(scope, receive, send)

    transport = httpx.ASGITransport(Guard(app, None, True))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        slow = [asyncio.create_task(http.get("/slow")) for _ in range(64)]
        await asyncio.sleep(0.1)
        refused = await http.get("/")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "TOO_MANY_CONNECTIONS")
        for path in ("/healthz", "/readyz"):
            assert (await http.get(path)).status_code == 200
        is_over.set()
        assert {each.status_code for each in await asyncio.gather(*slow)} == {200}
        assert (await http.get("/")).status_code == 200


class Endless:
    """Answers with bytes without end."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(self._body())(scope, receive, send)

    async def _body(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(100_000)
                await asyncio.sleep(0)
        finally:
            self.ended.set()


@asynccontextmanager
async def serving(app: Endless) -> AsyncIterator[str]:
    """The URL of an application."""
    listener = bind(HttpConfig(endpoint="127.0.0.1:0"), log_into([]))
    assert listener is not None
    server, port = make_server(app), listener.getsockname()[1]
    await server.startup(sockets=[listener])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await close_server(server, listener)


async def test_a_peer_that_does_not_read_delays_no_shutdown() -> None:
    app = Endless()
    async with serving(app) as url:
        _, writer = await connect(url)
        writer.write(ASK)
        await asyncio.sleep(0.5)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert app.ended.is_set()
    writer.close()


async def test_bytes_that_are_no_request_are_refused() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        for request in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"GET /" + b"z" * 70_000):
            assert (await raw(server.admin.url, request)).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        chunked = b"GET / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        assert (await raw(server.admin.url, chunked + b"nonsense\r\n")).count(b"HTTP/1.1 400") == 1
        assert (await http.get("/healthz")).status_code == 200
