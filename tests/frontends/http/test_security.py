"""Which requests and connections are served: tokens, hosts, methods, bodies and limits, over real sockets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from instep.config import Config
from instep.frontends.http import security
from instep.frontends.http.security import Guard
from instep.server.preparation import CannotServe
from tests.support.admin import administered, connect, error, raw
from tests.support.models import SMALL
from tests.support.running import running

TOKEN = "correct-horse-battery"
PATHS = ("/", "/api/stats", "/api/streams", "/api/streams/s", "/api/events", "/static/app.js", "/nothing")
HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


async def test_every_path_but_health_wants_the_token(token_file: Path) -> None:
    async with administered(http={"token_file": token_file}) as (_, http):
        for path in HEALTH:
            assert (await http.get(path)).status_code == 200
        bearer = f"Bearer {TOKEN}"
        for wrong in ("", f"Basic {TOKEN}", f"{bearer}x", f"Bearer {TOKEN[:-1]}", "Bearer ü"):
            for path in PATHS:
                headers = {"authorization": wrong.encode()} if wrong else {}
                assert "Bearer TOKEN" in await error(http, path, 401, headers=headers), (wrong, path)
                assert TOKEN not in await error(http, path, 401, headers=headers)
        assert (await http.get("/api/stats", headers={"authorization": bearer})).status_code == 200
        assert (await http.get("/api/stats", headers={"authorization": f"bearer  {TOKEN}"})).status_code == 200


async def test_each_of_several_tokens_is_good_until_it_is_withdrawn(token_file: Path) -> None:
    def write(content: str) -> None:
        token_file.write_text(content)

    write(f"prometheus: {TOKEN}\n\nann:  {TOKEN}:2\n")
    async with administered(http={"token_file": token_file}) as (server, http):
        shown = [{"authorization": f"Bearer {token}"} for token in (TOKEN, f"{TOKEN}:2", f"ann: {TOKEN}:2")]
        assert [(await http.get("/api/stats", headers=each)).status_code for each in shown] == [200, 200, 401]
        write(f"ann: {TOKEN}:2\n")
        assert server.admin is not None
        async with http.stream("GET", "/api/events", headers=shown[0]) as answer:
            server.admin.admit(security.read_tokens(server.config.http))
            assert "event: bye" in (await answer.aread()).decode()
        assert [(await http.get("/api/stats", headers=each)).status_code for each in shown] == [401, 200, 401]
        async with http.stream("GET", "/api/events", headers=shown[1]) as answer:
            assert "event: stats" in await anext(answer.aiter_text())


async def test_a_browser_asks_for_the_token_as_a_password(token_file: Path) -> None:
    async with administered(http={"token_file": token_file}) as (_, http):
        assert (await http.get("/")).headers["www-authenticate"].startswith("Basic ")
        for path in ("/", "/api/stats"):
            assert (await http.get(path, auth=("anybody", TOKEN))).status_code == 200
        for wrong in (("", ""), (TOKEN, ""), ("anybody", f"{TOKEN}x")):
            await error(http, "/", 401, auth=wrong)
        for wrong_header in ("Basic", "Basic ?", "Basic eA==", "Basic /w=="):
            await error(http, "/", 401, headers={"authorization": wrong_header})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"short", "at least 16"),
        (b"two words are too many", "at least 16"),
        (b"ann: correct-horse-battery\nann: another-good-battery", "distinct"),
        (b"ann: correct-horse-battery\nshort", "at least 16"),
        (b"\xff" * 20, "text file"),
        (None, "No such file"),
    ],
)
async def test_a_token_file_without_a_token_ends_the_start(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CannotServe, match=sentence) as caught:
        async with running(SMALL, http={"endpoint": "127.0.0.1:0", "token_file": file}):
            pass
    assert str(file) in str(caught.value)
    async with running(SMALL, http={"endpoint": "off", "token_file": file}) as server:  # nobody would need it
        assert server.admin is None


async def test_other_machines_are_only_served_with_a_token(token_file: Path) -> None:
    for endpoint in ("0.0.0.0:0", "[::]:0", "example.org:80"):
        with pytest.raises(ValueError, match=r"http\.endpoint"):
            Config.model_validate({"http": {"endpoint": endpoint}})
    async with administered(http={"endpoint": "0.0.0.0:0", "token_file": token_file}) as (_, http):
        assert "Bearer" in await error(http, "/api/stats", 401, headers={"host": "gpu-7.example.org"})
        headers = {"host": "gpu-7.example.org", "authorization": f"Bearer {TOKEN}"}
        assert (await http.get("/api/stats", headers=headers)).status_code == 200


async def test_on_loopback_the_host_must_be_this_machine() -> None:
    async with administered() as (_, http):
        for good in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.8.9.1:99", "[::1]:5780"):
            assert (await http.get("/api/stats", headers={"host": good})).status_code == 200, good
        for bad in ("evil.example", "localhost.evil.example", "10.0.0.1", "[2001:db8::1]", "127.0.0.1@evil", "", "::1"):
            for path in ("/api/stats", "/healthz"):
                assert "localhost" in await error(http, path, 421, headers={"host": bad})


async def test_pages_of_other_sites_read_nothing() -> None:
    async with administered() as (_, http):
        for site in ("cross-site", "same-site"):
            assert "other sites" in await error(http, "/api/events", 403, headers={"sec-fetch-site": site})
            following = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
            assert (await http.get("/api/stats", headers=following)).status_code == 200
        answer = await http.get(
            "/api/stats", headers={"sec-fetch-site": "same-origin", "origin": "http://evil.example"}
        )
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_only_get_and_head_without_a_body() -> None:
    async with administered() as (_, http):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
            assert "GET or HEAD" in await error(http, "/api/stats", 405, method=method)
        assert (await http.post("/api/stats")).headers["allow"] == "GET, HEAD"
        for content in ({"content": b"x"}, {"content": aiter_of(b"x"), "headers": {"transfer-encoding": "chunked"}}):
            assert "no body" in await error(http, "/api/stats", 413, **content)
        head = await http.head("/api/stats")
        assert (head.status_code, head.content) == (200, b"")
        assert (await http.head("/api/events")).headers["content-type"].startswith("text/event-stream")


async def aiter_of(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_more_requests_than_the_rate_allows_are_refused_but_for_health() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        ask = b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n"
        answers = await raw(server.admin.url, (ask + b"\r\n") * 999 + ask + b"connection: close\r\n\r\n")
        codes = re.findall(rb"HTTP/1.1 (\d+)", answers)
        assert codes[:200] == [b"404"] * 200
        assert len(codes) == 1000
        assert b"429" in codes
        assert b'"code":"TOO_MANY_REQUESTS"' in answers
        assert set(re.findall(rb"retry-after: (\d+)", answers)) == {b"1"}
        assert [(await http.get(path)).status_code for path in HEALTH] == [200] * len(HEALTH)
        while (await http.get("/api/stats")).status_code != 200:
            await asyncio.sleep(0.01)


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


async def test_bytes_that_are_no_request_are_refused() -> None:
    async with administered() as (server, http):
        assert server.admin is not None
        for request in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"GET /" + b"z" * 70_000):
            assert (await raw(server.admin.url, request)).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        chunked = b"GET / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        assert (await raw(server.admin.url, chunked + b"nonsense\r\n")).count(b"HTTP/1.1 400") == 1
        assert (await http.get("/healthz")).status_code == 200
