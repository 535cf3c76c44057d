"""A server with an admin server, and a client of that over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from instep.models.model import Model
from instep.server.server import Server
from tests.support.models import SMALL
from tests.support.running import running


@asynccontextmanager
async def administered(*models: Model, **sections: Any) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """Serve models, or `SMALL`, as `running` does."""
    http = {"endpoint": "127.0.0.1:0", **sections.pop("http", {})}
    async with running(*(models or (SMALL,)), http=http, **sections) as server:
        assert server.admin is not None
        async with httpx.AsyncClient(base_url=server.admin.url, timeout=30) as client:
            yield server, client


async def error(client: httpx.AsyncClient, path: str, status: int, **options: Any) -> str:
    """The sentence of an error, which must have this status."""
    answer = await client.request(options.pop("method", "GET"), path, **options)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    told: dict[str, str] = answer.json()["error"]
    assert told.keys() == {"code", "message"}
    return told["message"]


async def raw(url: str, request: bytes, address: str = "127.0.0.1") -> bytes:
    """Everything that is answered to some bytes from an address."""
    reader, writer = await connect(url, address)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def connect(url: str, address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection from an address."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port), local_addr=(address, 0))
