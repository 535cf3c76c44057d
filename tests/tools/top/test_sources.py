"""What `top` learns of a real server, compared with what was sent to it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from instep.models.folder import write_model
from instep_client import AsyncClient
from instep_client.endpoint import checked_endpoint
from instep_client.protocol.errors import ConnectionFailed, InstepError
from instep_tools.app import app
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.top.command import Top, source_of, top
from instep_tools.top.http_source import HttpSource
from instep_tools.top.snapshot import Source, StreamQuery
from instep_tools.top.zmq_source import ZmqSource
from tests.support.fake_server import FakeServer
from tests.support.models import SEED_SIZED, SMALL, plain
from tests.support.running import running
from tests.support.swapping import reload_models
from tests.tools.helpers import RememberingTerminal
from tests.tools.top.support import ADMIN, TRANSPORTS, endpoint_of


async def test_rates_of_streams_are_differences_of_two_lists() -> None:
    times: Iterator[float]
    async with running(SEED_SIZED) as server, AsyncClient(server.endpoint) as client:
        fast, slow, done = [await client.open(name) for name in ("fast", "slow", "done")]
        await done.step(np.zeros((9, 3), np.float32))
        times = iter([100.0, 100.0, 102.0, 102.0, 102.1, 103.0, 103.0])
        source = ZmqSource(server.endpoint, times.__next__)
        first = await source.read(StreamQuery())
        assert {stream.name: (stream.seq, stream.rate) for stream in first.streams} == {
            "fast": (0, None),
            "slow": (0, None),
            "done": (9, None),
        }
        await fast.step(np.zeros((20, 3), np.float32))
        await slow.step(np.zeros((5, 3), np.float32))
        await client.open("new")
        second = await source.read(StreamQuery())
        assert [(stream.name, stream.rate) for stream in second.streams] == [
            ("fast", 10.0),
            ("slow", 2.5),
            ("done", 0.0),
            ("new", None),
        ]
        assert second.model.numbers["frames_total"] == 34
        await slow.step(np.zeros((5, 3), np.float32))
        too_soon = await source.read(StreamQuery(sort="name", contains="o"))
        assert [(stream.name, stream.seq) for stream in too_soon.streams] == [("done", 9), ("slow", 5)]
        third = await source.read(StreamQuery(contains="slow"))
        assert [(stream.seq, stream.rate) for stream in third.streams] == [(10, 5.0)]
        await source.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_streams_that_are_equal_in_the_order_are_in_that_of_their_names(transport: str) -> None:
    async with running(SEED_SIZED, http=ADMIN) as server, AsyncClient(server.endpoint) as client:
        await client.open_group(["b", "c", "a"])
        async with closing(source_of(Top(endpoint_of(server, transport)))) as source:
            seen = await source.read(StreamQuery(sort="seq"))
        assert [stream.name for stream in seen.streams] == ["a", "b", "c"]


@asynccontextmanager
async def served(transport: str) -> AsyncIterator[str]:
    """A server with two models and known frames; its endpoint."""
    async with running(replace(SEED_SIZED, name="ears"), replace(SMALL, name="eyes"), http=ADMIN) as server:
        async with AsyncClient(server.endpoint) as ears, AsyncClient(server.endpoint, model="eyes") as eyes:
            stream = await ears.open("mic")
            await stream.step(np.ones((12, 3), np.float32))
            for name in ("left", "right"):
                stream = await eyes.open(name)
                await stream.step(np.ones((7, 5), np.float32))
            yield endpoint_of(server, transport)


@asynccontextmanager
async def closing(source: Source) -> AsyncIterator[Source]:
    """End its connection after the block."""
    try:
        yield source
    finally:
        await source.close()


async def once(what: Top) -> RememberingTerminal:
    terminal = RememberingTerminal(as_json=True)
    assert await top(what, terminal, Stop()) == Exit.OK
    return terminal


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_once_as_json_says_what_was_sent(transport: str) -> None:
    async with served(transport) as endpoint:
        seen = (await once(Top(endpoint, every_s=0.7))).json()
        other = (await once(Top(endpoint, "eyes", every_s=0.5))).json()
        shown = RememberingTerminal()
        assert await top(Top(endpoint), shown, Stop()) == Exit.OK  # it is no terminal, so once
        with pytest.raises(InstepError, match="'nobody'"):
            await once(Top(endpoint, "nobody"))
    assert (shown.said.splitlines()[0].split()[:3], shown.data) == (["instep", "top", endpoint], "")
    assert [line.split()[:2] for line in shown.said.splitlines()[-2:]] == [["name", "state"], ["mic", "connected"]]
    assert max(map(len, shown.said.splitlines())) <= 80
    assert (seen["endpoint"], seen["matched"]) == (endpoint, 1)
    assert [(model["name"], model["streams"], model["frames"]) for model in seen["models"]] == [
        ("ears", 1, 12),
        ("eyes", 2, 14),
    ]
    assert [model["frames_per_s"] for model in seen["models"]] == [0.0, 0.0]
    assert (seen["model"]["name"], seen["model"]["fingerprint"]) == ("ears", SEED_SIZED.fingerprint)
    assert (seen["model"]["features"], seen["model"]["outputs"]) == (3, 4)
    assert (seen["model"]["numbers"]["frames_total"], seen["model"]["numbers"]["connections"]) == (
        12,
        1 + (transport == "zmq"),
    )
    assert seen["model"]["rates"]["frames_total"] == 0
    (stream,) = seen["streams"]
    assert (stream["name"], stream["state"], stream["seq"], stream["rate"]) == ("mic", "connected", 12, 0.0)
    assert (stream["pending"], stream["expires_in_s"]) == (0, pytest.approx(3600, abs=60))
    assert [(stream["name"], stream["seq"]) for stream in other["streams"]] == [("left", 7), ("right", 7)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_query_selects_and_sorts(transport: str) -> None:
    sections: dict[str, Any] = {"http": ADMIN, "transport": {"heartbeat_s": 0.5}}
    async with running(SEED_SIZED, **sections) as server, AsyncClient(server.endpoint) as client:
        for name, frames in (("mic-1", 5), ("mic-2", 30), ("日本 &=#", 7), ("lamp", 1)):
            stream = await client.open(name)
            await stream.step(np.zeros((frames, 3), np.float32))
        async with AsyncClient(server.endpoint) as another:
            await another.resume("lamp", take_over=True)
            await another.close(park=True)
        async with closing(source_of(Top(endpoint_of(server, transport)))) as source:

            async def names(**query: Any) -> list[str]:
                seen = await source.read(StreamQuery(**query))
                assert seen.matched == len(seen.streams) or query["limit"] == len(seen.streams)
                return [stream.name for stream in seen.streams]

            async with asyncio.timeout(60):
                while await names(state="parked") != ["lamp"]:
                    await asyncio.sleep(0.1)
            assert await names(sort="seq") == ["mic-2", "日本 &=#", "mic-1", "lamp"]
            assert await names(sort="seq", reverse=True) == ["lamp", "mic-1", "日本 &=#", "mic-2"]
            assert await names(sort="name", limit=2) == ["lamp", "mic-1"]
            assert await names(sort="idle", limit=1) == ["mic-1"]
            assert await names(sort="name", contains="mic") == ["mic-1", "mic-2"]
            assert await names(contains="日本 &=#") == ["日本 &=#"]
            assert await names(state="connected", sort="name") == ["mic-1", "mic-2", "日本 &=#"]
            assert await names(state="hibernating") == []


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_rates_while_frames_arrive(transport: str) -> None:
    async with running(SEED_SIZED, http=ADMIN) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic")

        async def send() -> None:
            while True:
                await stream.step(np.zeros((10, 3), np.float32))
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(send())
        seen = (await once(Top(endpoint_of(server, transport), every_s=1.0))).json()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    rate = seen["model"]["rates"]["frames_total"]
    assert rate > 0
    assert seen["streams"][0]["rate"] == pytest.approx(rate, rel=0.5)
    assert seen["models"][0]["frames_per_s"] == pytest.approx(rate, rel=0.5)


async def test_a_swapped_model_is_shown_in_its_new_version_and_its_old_one_is_not_kept(tmp_path: Path) -> None:
    old, new = replace(SMALL, name="ears"), replace(plain(5, 8, seed=9), name="ears")
    write_model(tmp_path / "new", new)
    async with running(old, engine={"max_batch_size": 16}) as server:
        source = ZmqSource(server.endpoint)
        async with AsyncClient(server.endpoint):
            assert (await source.read(StreamQuery())).model.fingerprint == old.fingerprint
            assert not await reload_models(server, tmp_path / "new")
            seen = await source.read(StreamQuery())
            assert seen.model.fingerprint == new.fingerprint
            assert [model.name for model in seen.models] == ["ears", f"ears@{old.fingerprint[:8]}"]
        async with asyncio.timeout(60):
            while len((await source.read(StreamQuery())).models) > 1:
                await asyncio.sleep(0.01)
        with pytest.raises(InstepError, match="UNKNOWN_MODEL"):
            await source.read(StreamQuery("nobody"))
        assert (await source.read(StreamQuery())).model.name == "ears"
        await source.close()


async def test_a_server_with_fewer_numbers_is_shown_with_dashes() -> None:
    with FakeServer() as server:  # its STATS has three
        async with AsyncClient(server.endpoint) as client:
            await client.open("mic")
            seen = (await once(Top(server.endpoint, every_s=0.5))).json()
            shown = RememberingTerminal()
            assert await top(Top(server.endpoint, every_s=0.5), shown, Stop()) == Exit.OK
    assert set(seen["model"]["numbers"]) == {"ready", "streams_open", "blocks"}
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.said.splitlines()}
    assert lines["instep"].endswith(" up –")
    assert lines["server"] == "ready, 0 frames/s, 1 stream, 1 connection, loop –"
    assert lines["streams"] == "1 open of 100,000, – of them parked; – hibernating"
    assert lines["mic"].startswith("connected ")


def test_nobody_answers() -> None:
    for endpoint in ("tcp://127.0.0.1:9", "http://127.0.0.1:9", "http://a..b:9"):
        for words, variable in (([endpoint], "ftp://h"), (["-e", endpoint], ""), ([], endpoint)):
            result = CliRunner().invoke(app, ["top", *words, "--once"], env={"INSTEP_ENDPOINT": variable})
            assert result.exit_code == 2
            assert endpoint in result.stderr
    twice = CliRunner().invoke(app, ["top", "tcp://127.0.0.1:9", "--endpoint", "tcp://127.0.0.1:8", "--once"])
    assert twice.exit_code == 2
    assert "name one endpoint" in " ".join(twice.stderr.replace("│", " ").split())
    for endpoint, advice in (
        ("", "or http://127.0.0.1:5780"),
        ("http://", "write http://HOST:PORT"),
        ("http://h:0", "write http://HOST:PORT"),
        ("ftp://h", "or http://127.0.0.1:5780"),
        ("127.0.0.1:5757", "write tcp://127.0.0.1:5757, or http://127.0.0.1:5780"),
    ):
        result = CliRunner().invoke(app, ["top", endpoint])
        assert result.exit_code == 2
        said = " ".join(result.stderr.replace("│", " ").split())
        assert "is not an endpoint" in said
        assert advice in said


async def test_the_token_of_an_admin_server(tmp_path: Path) -> None:
    for name, token in (("right", "s" * 16), ("wrong", "x" * 16)):
        (tmp_path / name).write_text(token + "\n")
        (tmp_path / name).chmod(0o600)
    async with running(SEED_SIZED, http=ADMIN | {"token_file": tmp_path / "right"}) as server:
        what = Top(endpoint_of(server, "http"), every_s=0.5)
        seen = (await once(replace(what, token_file=tmp_path / "right"))).json()
        assert seen["model"]["name"] == SEED_SIZED.name
        for bad, problem in ((None, "wants a token"), (tmp_path / "wrong", "takes another token")):
            with pytest.raises(InstepError, match=f"{problem}: name the file that holds it with --token-file"):
                await once(replace(what, token_file=bad))


def test_a_token_that_cannot_be_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["top", "http://h:1", "--once", "--token-file", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "cannot be read as a token: No such file or directory" in " ".join(result.stderr.split())


ZEROMQ = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f"
"""The first bytes of every ZeroMQ endpoint."""


@asynccontextmanager
async def answering(answer: bytes, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """A server that gives its only client this answer; its URL."""
    is_over = asyncio.Event()

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        assert b"Authorization: Bearer secret\r\n" in asked
        writer.write(answer)
        if answer.startswith(ZEROMQ):
            await reader.read()  # it waits for an answer
        writer.close()
        await writer.wait_closed()
        is_over.set()

    async with await asyncio.start_server(answered, host.strip("[]"), 0) as server:
        yield f"http://{host}:{server.sockets[0].getsockname()[1]}"
        await is_over.wait()


REFUSED = json.dumps({"error": {"code": "OTHER_SITE", "message": "this server says no"}}).encode()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n" + REFUSED, "answers 403: this server says no"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n<html>", "answers 404: not an instep server"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "answers 200: not an instep server"),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "does not answer as an instep server"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 10**6, "answers 200: not an instep server"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n\r\n", "answers 302"),
        (ZEROMQ, "is a ZeroMQ endpoint: write tcp://"),
        (b"", "does not speak HTTP: write tcp://"),
    ],
)
async def test_other_answers_over_http(answer: bytes, sentence: str) -> None:
    async with answering(answer) as url:
        with pytest.raises(InstepError, match=sentence) as found:
            await HttpSource(url, "secret").read(StreamQuery())
    assert not isinstance(found.value, ConnectionFailed)


async def test_a_port_at_which_nobody_listens() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{bound.getsockname()[1]}"
            with pytest.raises(ConnectionFailed, match=f"^nobody answers at {url}: Connection refused$"):
                await HttpSource(url).read(StreamQuery())


async def test_an_endpoint_of_zeromq_with_an_ipv6_address_leads_to_one_that_can_be_typed() -> None:
    async with answering(ZEROMQ, "[::1]") as url:
        with pytest.raises(InstepError) as found:
            await HttpSource(url, "secret").read(StreamQuery())
    (endpoint,) = re.findall(r"tcp://\S+", str(found.value))
    assert checked_endpoint(endpoint) == url.replace("http", "tcp")
    assert "http://[::1]:5780" in str(found.value)
