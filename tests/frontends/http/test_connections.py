"""How many connections there may be, and what ends them; over real sockets."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from instep.config import HttpConfig
from instep.frontends.http.connections import Connections, bind, url_of
from tests.support.admin import administered, connect, error, raw
from tests.support.running import log_into

ASK = b"GET /healthz HTTP/1.0\r\nhost: localhost\r\n\r\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS gives a machine 127.0.0.1 and no other address of that net")
async def test_connections_are_bounded_in_all_and_of_one_address() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        url = server.admin.url
        one, two, three = "127.0.0.1", "127.0.0.2", "127.0.0.3"  # every address of the net is this machine
        idle = [await connect(url, one) for _ in range(24)]
        answer = await raw(url, ASK, one)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b'"code":"TOO_MANY_CONNECTIONS"' in answer
        assert b"has 24 connections from this address already" in answer
        assert "24 connections" in await error(http, "/api/stats", 503)  # a client that sends before it reads
        assert b"200 OK" in await raw(url, ASK, two)
        idle += [await connect(url, two) for _ in range(24)] + [await connect(url, three) for _ in range(16)]
        assert b"has 64 connections already" in await raw(url, ASK, "127.0.0.4")
        idle[-1][1].close()
        while b"200 OK" not in await raw(url, ASK, "127.0.0.4"):
            await asyncio.sleep(0.01)
        for _, writer in idle:
            writer.close()


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
async def connections_to(app: Endless, **limits: float) -> AsyncIterator[str]:
    """The URL of an application."""
    listener = bind(HttpConfig(endpoint="127.0.0.1:0"), log_into([]))
    assert listener is not None
    connections, url = Connections(listener, app, **limits), url_of(listener)
    await connections.start()
    try:
        yield url
    finally:
        await connections.close()


async def test_a_connection_that_does_not_ask_is_ended() -> None:
    async with connections_to(Endless(), request_s=0.1) as url:
        assert await raw(url, b"") == b""
        assert await raw(url, b"GET /healthz HTTP/1.1\r\nhost: local") == b""


async def test_a_peer_that_does_not_read_is_dropped_and_delays_no_shutdown() -> None:
    for limits, is_dropped in (({"unread_s": 0.3}, True), ({}, False)):
        app = Endless()
        async with connections_to(app, **limits) as url:
            _, writer = await connect(url)
            writer.write(ASK)
            if is_dropped:
                await asyncio.wait_for(app.ended.wait(), 30)
            else:
                await asyncio.sleep(0.5)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert app.ended.is_set()
        writer.close()
