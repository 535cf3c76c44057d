"""Lists of streams, filtered and cut into pages, and each stream by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from instep_client import AsyncClient
from tests.support.admin import administered, error
from tests.support.models import SEED_SIZED, SMALL

F = 5


async def all_pages(http: httpx.AsyncClient, **asked: Any) -> list[dict[str, Any]]:
    """The streams of all pages."""
    streams: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await http.get("/api/streams", params={**asked, **cursor})).json()
        assert len(page["streams"]) == asked.get("limit", 50) or page["cursor"] is None
        streams += page["streams"]
        if page["cursor"] is None:
            return streams
        cursor = {"cursor": page["cursor"]}


def names(streams: list[dict[str, Any]]) -> list[str]:
    return [stream["name"] for stream in streams]


async def until(http: httpx.AsyncClient, count: int, **asked: Any) -> None:
    while len((await http.get("/api/streams", params=asked)).json()["streams"]) != count:
        await asyncio.sleep(0.02)


async def test_each_state_has_its_record(tmp_path: Path) -> None:
    sections = {
        "recording": {"path": tmp_path / "r.instep"},
        "transport": {"heartbeat_s": 0.1},
        "limits": {"hibernate_after_s": 0.0, "max_parked_streams": 2, "park_s": 100.0, "max_idle_s": 50.0},
    }
    async with administered(**sections) as (server, http), AsyncClient(server.endpoint) as client:
        async with AsyncClient(server.endpoint) as other:
            for name in ("old/1", "old/2", "old/3"):
                stream = await other.open(name)
                await stream.step(np.zeros((3, F)))
            await other.close(park=True)
        await until(http, 1, state="hibernating")
        await (await client.open("new")).step(np.zeros((2, F)))
        page = (await http.get("/api/streams")).json()
        assert (page["total"], page["cursor"], page["model"]) == (4, None, SMALL.name)
        by_name = {each["name"]: each for each in page["streams"]}
        new, asleep, parked = by_name["new"], by_name["old/1"], by_name["old/2"]
        assert (new["state"], new["seq"], new["pending"], new["parked_s"]) == ("connected", 2, 0, None)
        assert isinstance(new["owner"], int)
        assert 40 < new["expires_in_s"] <= 50
        assert (parked["state"], parked["owner"], parked["seq"]) == ("parked", None, 3)
        assert 0 <= parked["parked_s"] < 40 < parked["expires_in_s"] <= 100
        assert (asleep["state"], asleep["seq"], asleep["owner"]) == ("hibernating", None, None)
        for state, found in (("connected", ["new"]), ("parked", ["old/2", "old/3"]), ("hibernating", ["old/1"])):
            assert sorted(names(await all_pages(http, state=state))) == found
        (await http.get("/api/streams/old/1")).raise_for_status()


async def test_pages_hold_every_stream_once() -> None:
    given = [f"{'äβ/ %'[number % 5]}{number:03d}" for number in range(97)]
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        for name in given:
            await client.open(name)
        for limit in (7, 97, 500):
            assert sorted(names(await all_pages(http, limit=limit))) == sorted(given)
        assert sorted(names(await all_pages(http, prefix="%0", limit=3))) == [n for n in given if n.startswith("%0")]


async def test_what_there_is_not_is_answered_with_what_was_meant() -> None:
    async with administered(SMALL, SEED_SIZED) as (server, http), AsyncClient(server.endpoint) as client:
        await client.open_group(["mic-1", "mic-2"])
        for path, status, meant in (
            ("/api/streams/nothing-like-it", 404, "nothing-like-it"),
            (f"/api/streams?model={SMALL.name[:-1]}", 404, repr(SMALL.name)),
            ("/api/streams?model=x", 404, repr(SEED_SIZED.name)),
            ("/api/streams?state=hibernated", 400, "'hibernating'"),
            ("/api/streams?limt=3", 400, "'limit'"),
            ("/metrics?model=x", 400, "'model'"),
            *((f"/api/streams?limit={limit}", 400, "500") for limit in ("0", "501", "²", "0000000000000015000")),
            *((f"/api/streams?cursor={cursor}", 400, "cursor") for cursor in ("x", "-1", "", "9" * 20)),
            ("/api/strems", 404, "/api/streams"),
            ("/nothing", 404, "/api/stats"),
        ):
            assert meant in await error(http, path, status), path
        assert (await http.get("/api/streams", params={"model": SEED_SIZED.name})).json()["total"] == 0
