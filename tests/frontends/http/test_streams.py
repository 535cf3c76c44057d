"""Lists of streams, filtered, sorted and cut into pages, and each stream by itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from instep.frontends.http.streams import Inspector
from instep.server.server import Server
from instep.streaming.tasks import Tasks
from instep_client import AsyncClient
from tests.support.admin import administered, error, longest_turn
from tests.support.models import SEED_SIZED, SMALL
from tests.support.running import running

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


async def until(http: httpx.AsyncClient, matched: int, **asked: Any) -> None:
    while (await http.get("/api/streams", params=asked)).json()["matched"] != matched:
        await asyncio.sleep(0.02)


async def test_each_state_has_its_record(tmp_path: Path) -> None:
    sections = {
        "recording": {"file": tmp_path / "r.instep"},
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
        assert (page["total"], page["matched"], page["cursor"], page["model"]) == (4, 4, None, SMALL.name)
        assert names(page["streams"]) == ["new", "old/1", "old/2", "old/3"]
        new, asleep, parked, _ = page["streams"]
        assert (new["state"], new["seq"], new["pending"], new["parked_s"]) == ("connected", 2, 0, None)
        assert isinstance(new["owner"], int)
        assert 40 < new["expires_in_s"] <= 50
        assert (parked["state"], parked["owner"], parked["seq"]) == ("parked", None, 3)
        assert 0 <= parked["parked_s"] < 40 < parked["expires_in_s"] <= 100
        assert (asleep["state"], asleep["seq"], asleep["rate"], asleep["owner"]) == ("hibernating", None, 0.0, None)
        for state, found in (("connected", ["new"]), ("parked", ["old/2", "old/3"]), ("hibernating", ["old/1"])):
            assert names(await all_pages(http, state=state)) == found
        assert sorted(names(await all_pages(http, sort="-idle", state="parked"))) == ["old/2", "old/3"]
        assert names(await all_pages(http, sort="seq", contains="")) == ["old/1", "new", "old/2", "old/3"]
        (await http.get("/api/streams/old/1")).raise_for_status()


async def test_pages_hold_every_stream_once_in_every_order(rng: np.random.Generator) -> None:
    given = {f"{'äβ/ %'[number % 5]}{number:03d}": int(rng.integers(0, 4)) for number in rng.permutation(97).tolist()}
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        for name, frames in given.items():
            stream = await client.open(name)
            if frames:
                await stream.step(np.zeros((frames, F)))
        for limit in (7, 97, 500):
            for sort, key in (("name", lambda name: name), ("seq", lambda name: given[name])):
                for sign in ("", "-"):
                    found = names(await all_pages(http, sort=sign + sort, limit=limit))
                    assert sorted(found) == sorted(given)
                    keys = [key(name) for name in found]
                    assert keys == sorted(keys, reverse=sign == "-")
        assert names(await all_pages(http, contains="β", limit=3)) == sorted(name for name in given if "β" in name)
        assert sorted(names(await all_pages(http, sort="-rate", limit=7))) == sorted(given)


@pytest.mark.parametrize("sort", ["name", "-name", "seq", "-idle"])
@pytest.mark.parametrize("first", ["a", "z"])
async def test_a_stream_that_leaves_memory_while_a_page_is_made_is_on_it_once(
    tmp_path: Path, sort: str, first: str
) -> None:
    async with (
        running(SMALL, recording={"file": tmp_path / "r.instep"}, transport={"heartbeat_s": 0.5}) as server,
        AsyncClient(server.endpoint) as client,
    ):
        async with AsyncClient(server.endpoint) as other:
            await (await other.open(first)).step(np.zeros((3, F)))
            await other.close(park=True)
        await client.open("m")
        while server.default.engine.stats.parked_streams_total < 1:
            await asyncio.sleep(0.01)
        inspector = Inspector(server, Tasks(lambda error: pytest.fail(str(error))))
        making = asyncio.create_task(inspector.page({"sort": sort}))
        await asyncio.sleep(0)  # those in memory were looked at
        assert server.default.operations.hibernation.hibernate_parked(1) == 1
        page = await making
        assert sorted(names(page["streams"])) == sorted([first, "m"])
        assert (page["total"], page["matched"], page["cursor"]) == (2, 2, None)


async def test_rates_are_frames_per_second() -> None:
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        fast, slow, still = [await client.open(name) for name in ("fast", "slow", "still")]
        first = (await http.get("/api/streams")).json()["streams"]
        assert [stream["rate"] for stream in first] == [None, None, None]  # it was not looked at for long enough
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            await asyncio.gather(fast.step(np.zeros((20, F))), slow.step(np.zeros((2, F))))
            await asyncio.sleep(0.05)
            page = (await http.get("/api/streams", params={"sort": "-rate"})).json()
        assert names(page["streams"]) == ["fast", "slow", "still"]
        rates = [stream["rate"] for stream in page["streams"]]
        assert rates[0] == pytest.approx(10 * rates[1], rel=0.2)
        assert rates[2] == 0
        total = (await http.get("/api/streams/fast")).json()
        assert 0 < rates[0] < total["seq"] / 1.0
        assert still.next_seq == 0


async def test_what_there_is_not_is_answered_with_what_was_meant() -> None:
    async with administered(SMALL, SEED_SIZED) as (server, http), AsyncClient(server.endpoint) as client:
        await client.open_group(["mic-1", "mic-2"])
        for path, status, meant in (
            ("/api/streams/nothing-like-it", 404, "has no stream"),
            (f"/api/streams?model={SMALL.name[:-1]}", 404, f"did you mean {SMALL.name!r}"),
            ("/api/streams?model=x", 404, repr(SEED_SIZED.name)),
            ("/api/streams?sort=names", 400, "did you mean 'name'"),
            ("/api/streams?sort=--name", 400, "sorted by"),
            ("/api/streams?state=hibernated", 400, "did you mean 'hibernating'"),
            ("/api/streams?limt=3", 400, "did you mean 'limit'"),
            ("/api/streams/mic-1?modle=x", 400, "/api/streams/mic-1 has no parameter 'modle': did you mean 'model'?"),
            ("/api/history?modle=x", 400, "did you mean 'model'"),
            ("/api/events?steam=mic-1", 400, "did you mean 'stream'"),
            ("/metrics?model=x", 400, "/metrics has no parameter 'model': there is none"),
            *((f"/{path}?x", 400, "there is none") for path in ("healthz", "readyz", "api/stats", "static/app.js")),
            ("/?x=1", 400, "there is 'token'"),
            *(
                (f"/api/streams?limit={limit}", 400, "expected 1 to 500")
                for limit in ("0", "501", "-1", "x", "²", "0000000015000")
            ),
            *((f"/api/streams?cursor={cursor}", 400, "without one") for cursor in ("x", "W10", "ä", "WzEsMl0")),
            ("/api/strems", 404, "did you mean /api/streams"),
            ("/api/streams/?limit=3", 404, "did you mean /api/streams?"),
            ("/v2/health", 404, "did you mean /v2/health/"),
            ("/v2/health/redy", 404, "did you mean /v2/health/ready"),
            ("/nothing", 404, "/api/stats"),
        ):
            assert meant in await error(http, path, status), path
        assert (await http.get("/api/streams", params={"model": SEED_SIZED.name})).json()["total"] == 0
        cursor = (await http.get("/api/streams?limit=1")).json()["cursor"]
        assert "without one" in await error(http, f"/api/streams?limit=1&sort=seq&cursor={cursor}", 400)
        assert (await http.get(f"/api/streams?limit=1&cursor={cursor}")).json()["streams"][0]["name"] == "mic-2"
        for wrong in ("", f"{cursor}!", f"!{cursor}", f"{cursor[:9]}.{cursor[9:]}", f"{cursor}\n", f"{cursor}===="):
            await error(http, "/api/streams", 400, params={"limit": 1, "cursor": wrong})


@pytest.mark.long
async def test_a_page_of_a_hundred_thousand_streams_is_quick_and_keeps_nobody_waiting() -> None:
    count = 100_000
    engine, limits = {"max_streams": count}, {"window_frames": 1, "max_parked_streams": count}
    async with administered(engine=engine, limits=limits) as (server, http):
        fill(server, [f"s{number * 7919 % count:06d}" for number in range(count)])
        await http.get("/api/streams?limit=1")
        table = server.default.engine.table
        began = time.thread_time()
        sorted(table.names(table.open_slots()))
        at_once = time.thread_time() - began
        for asked in ("sort=name", "sort=-name&contains=9", "sort=-rate", "sort=idle", "sort=seq&limit=500"):
            began = time.thread_time()
            async with longest_turn() as longest:
                page = (await http.get(f"/api/streams?{asked}")).json()
            assert page["total"] == count
            took = time.thread_time() - began
            assert took < 6 * at_once, asked
            assert longest[0] < at_once / 2, asked
        assert names(await all_pages(http, contains="s0999", limit=7)) == [f"s0999{each:02d}" for each in range(100)]


def fill(server: Server, given: list[str]) -> None:
    """Open streams at once, parked."""
    table = server.default.engine.table
    table.open(given, table.parked, time.monotonic_ns())
