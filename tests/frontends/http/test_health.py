"""Health, statistics and the files of the page, over a real socket."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import httpx
import numpy as np
import pytest

from instep.config import HttpConfig
from instep.frontends.http.admin import AdminServer, bind
from instep.frontends.http.answers import STATIC
from instep.streaming.service import ModelService
from instep_client.aio import AsyncClient
from tests.support.admin import administered, error
from tests.support.models import SMALL
from tests.support.running import log_into, running


async def test_says_what_it_serves() -> None:
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        await stream.step([[1.0] * 5] * 3)
        stats = (await http.get("/api/stats")).json()
        (model,) = stats["models"]
        assert (stats["endpoint"], stats["ready"], stats["draining"]) == (server.endpoint, True, False)
        assert (model["name"], model["fingerprint"], model["kind"]) == (SMALL.name, SMALL.fingerprint, "gru")
        assert (model["features"], model["outputs"], model["device"]) == (5, 8, "cpu")
        assert model["numbers"]["streams_open"] == 1
        assert model["numbers"]["frames_total"] == 3
        assert (model["exactness"], model["arithmetic"]) == ("exact", "portable-1")


async def test_the_last_ten_minutes_are_columns_of_one_row_a_second() -> None:
    async with administered() as (server, http), AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        rows: list[float] = []
        while len(rows) < 2:
            await stream.step(np.zeros((5, 5)))
            await asyncio.sleep(0.05)
            history = (await http.get("/api/history", params={"model": SMALL.name})).json()
            rows = history["columns"]["time_s"]
        assert history["model"] == SMALL.name
        assert {len(column) for column in history["columns"].values()} == {len(rows)}
        assert rows == sorted(rows)
        assert max(history["columns"]["frames_per_s"]) > 0
        numbers = (await http.get("/api/stats")).json()["models"][0]["numbers"]
        assert numbers["recent_streams_open"] == 1


async def test_is_ready_until_it_drains() -> None:
    async with administered() as (server, http):
        for path in ("/readyz", "/v2/health/ready", "/healthz", "/v2/health/live"):
            assert (await http.get(path)).status_code == 200
        server.unread = "limits: is broken"
        assert (await http.get("/readyz")).json() == {"ready": True, "outdated": "limits: is broken"}
        server.default.engine.draining = True
        assert "did you mean /readyz?" in await error(http, "/readyz/", 404)
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert SMALL.name in answer.json()["error"]["message"]
        assert (await http.get("/healthz")).status_code == 200


class BadServer:
    """A server without a model, which no server is."""

    def __init__(self) -> None:
        self.endpoint = "tcp://127.0.0.1:5757"
        self.is_draining, self.outdated = False, ""
        self.services: list[ModelService] = []

    def used(self) -> dict[str, dict[str, float]]:
        return {}


async def test_a_bug_is_answered_and_logged() -> None:
    told: list[dict[str, Any]] = []
    listener = bind(HttpConfig(endpoint="127.0.0.1:0"), log_into(told))
    assert listener is not None
    admin = AdminServer(listener, None, BadServer(), log_into(told))
    await admin.start()
    async with httpx.AsyncClient(base_url=admin.url) as http:
        assert "its log says more" in await error(http, "/api/history", 500)
        assert (await http.get("/healthz")).status_code == 200
    await admin.close()
    (line,) = [line for line in told if line["level"] == "error"]
    assert (line["path"], type(line["exc_info"])) == ("/api/history", IndexError)


async def test_a_default_port_in_use_is_only_warned_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        told: list[dict[str, Any]] = []
        assert bind(HttpConfig(endpoint=endpoint), log_into(told), default=endpoint) is None
        (warning,) = [line for line in told if line["level"] == "warning"]
        assert endpoint in warning["reason"]


async def test_there_is_none_when_it_is_off_and_the_port_is_free_after_the_end() -> None:
    async with running(SMALL) as server:
        assert server.admin is None
    async with administered() as (server, http):
        assert server.admin is not None
        port = int(server.admin.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port), reuse_port=False)
    async with administered(http={"endpoint": f"127.0.0.1:{port}"}) as (_, http):
        assert (await asyncio.wait_for(http.get("/healthz"), 10)).json() == {"alive": True}


async def test_files_are_served_with_their_types_and_not_twice() -> None:
    async with administered() as (_, http):
        page = await http.get("/")
        assert (page.content, page.headers["content-type"]) == (
            (STATIC / "index.html").read_bytes(),
            "text/html; charset=utf-8",
        )
        assert (await http.get("/static/index.html")).content == page.content
        name = "vendor/uPlot.iife.min.js"
        script = await http.get(f"/static/{name}")
        assert script.content == (STATIC / name).read_bytes()
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["cache-control"] == "no-cache"
        again = await http.get(f"/static/{name}", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (STATIC.parent / "answers.py").is_file()
        for path in (
            "../answers.py",
            "%2e%2e/answers.py",
            "..%2fanswers.py",
            "vendor",
            "vendor/",
            "//etc/passwd",
            "a.js",
        ):
            await error(http, f"/static/{path}", 404)


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    for path in STATIC.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://(?!www\.w3\.org)", text), path
        assert not re.search(r"<script(?![^>]*\ssrc=)", text), path
