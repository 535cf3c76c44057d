"""Server-sent events, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from instep.frontends.http import admin
from instep_client import AsyncClient
from tests.support.admin import administered, connect, error
from tests.support.models import SEED_SIZED, SMALL

F = 5


async def read(answer: httpx.Response) -> AsyncIterator[tuple[str, str, Any]]:
    """Kind, id and data of each event."""
    kind = number = ""
    async for line in answer.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            kind, number = value, ""
        elif field == "id":
            number = value
        elif field == "data":
            yield kind, number, json.loads(value)


async def test_a_stream_that_is_looked_at_comes_with_them_until_it_is_closed() -> None:
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        stream = await client.open("a b")
        async with http.stream("GET", "/api/events", params={"stream": "a b", "model": SMALL.name}) as answer:
            seen: list[dict[str, Any]] = []
            async for kind, _, data in read(answer):
                if kind == "stream":
                    seen.append(data)
                    if data["state"] == "closed":
                        break
                    if data["seq"]:
                        await stream.close()
                    else:
                        await stream.step(np.zeros((2, F)))
            assert [data["name"] for data in seen] == ["a b"] * len(seen)
            assert seen[0]["seq"] == 0
            assert seen[-2]["seq"] == 2


async def test_what_happens_to_streams_comes_as_it_happens_or_from_a_number_on() -> None:
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        await client.open("before")

        async def told(count: int, **headers: str) -> list[tuple[str, Any]]:
            log: list[tuple[str, Any]] = []
            async with http.stream("GET", "/api/events", headers=headers) as answer:
                async for kind, number, data in read(answer):
                    if kind == "stats" and not headers and not log:
                        await (await client.open("after")).close()
                    elif kind == "log":
                        log.append((number, data))
                        if len(log) == count:
                            break
            return log

        now = await told(2)
        assert [(data["kind"], data["stream"]) for _, data in now] == [("opened", "after"), ("closed", "after")]
        assert [number for number, _ in now] == [str(data["number"]) for _, data in now] == ["2", "3"]
        both = await told(2, **{"last-event-id": "1"})
        assert both == now
        for number in ("0", "999999"):  # the latter is one of a former server
            log = await told(3, **{"last-event-id": number})
            assert [data["stream"] for _, data in log] == ["before", "after", "after"]
        record = (await http.get("/api/streams/before")).json()
        assert [event["kind"] for event in record["events"]] == ["opened"]


async def test_listeners_are_bounded() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        listeners = [await connect(server.admin.url, f"127.0.0.{number % 2 + 2}") for number in range(32)]
        for reader, writer in listeners:
            writer.write(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"event: stats\n")
        assert "32 programs listen" in await error(http, "/api/events", 503)
        for _, writer in listeners:
            writer.close()
        while (await http.send(http.build_request("GET", "/api/events"), stream=True)).status_code != 200:
            await asyncio.sleep(0.01)
        assert "did you mean" in await error(http, f"/api/events?model={SMALL.name}x", 404)


async def test_the_unloading_of_a_model_ends_them_with_goodbye() -> None:
    async with administered(SMALL, SEED_SIZED) as (server, http):
        asked = {"model": SEED_SIZED.name}
        async with http.stream("GET", "/api/events", params={**asked, "stream": "s"}) as answer:
            kinds = []
            async for kind, _, _ in read(answer):
                kinds.append(kind)
                if kinds == ["stats"]:
                    await server.remove(SEED_SIZED.name, "it is not wanted")
            assert kinds[-1] == "bye"
        await error(http, "/api/streams", 404, params=asked)
        assert [model["name"] for model in (await http.get("/api/stats")).json()["models"]] == [SMALL.name]


async def test_a_listener_that_takes_nothing_is_ended_and_one_that_reads_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin, "_TAKES_NOTHING_S", 1.5)
    async with administered() as (server, http), http.stream("GET", "/api/events") as answer:
        assert server.admin is not None
        host, _, port = server.admin.url.removeprefix("http://").rpartition(":")
        with socket.socket() as takes_nothing:
            takes_nothing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            takes_nothing.connect((host, int(port)))
            takes_nothing.sendall(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            ended = asyncio.create_task(_has_ended(takes_nothing))
            async for _ in read(answer):
                if ended.done():
                    break
            else:
                pytest.fail("the one that reads was ended, too")


async def _has_ended(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.send(b"\n"):  # refused once the other side has forgotten the connection
            await asyncio.sleep(0.05)
