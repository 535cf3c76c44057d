"""Which streams a server has: asked over the wire, by the client, and by the command that makes room."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep_client import AsyncClient, InvalidInput, StreamEvicted
from instep_client.protocol import wire
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind, Place
from instep_tools import streams
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.server import ping
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.tools.helpers import RememberingTerminal

F = 5


async def parked(endpoint: str, *names: str) -> None:
    """Open streams, step each once, and leave them parked."""
    async with AsyncClient(endpoint) as client:
        group = await client.open_group(names)
        await group.step(np.zeros((len(names), F)))
        await client.close(park=True)
    async with AsyncClient(endpoint) as client:
        while len(await client.list_streams(place="parked")) < len(names):
            await asyncio.sleep(0.01)


async def all_pages(client: RawClient, most: int, place: int) -> tuple[list[str], int]:
    """The names on all pages of streams that begin with s, and how many pages there were."""
    seen: list[str] = []
    cursor, pages = 0, 0
    while pages == 0 or cursor:
        header = msgpack.packb([Kind.LIST, client.next_request(), cursor, most, place])
        reply = await client.ask(header, b"s")
        count, cursor = reply.header[2:]
        seen += wire.unpack_names(reply.frames[0], count) if count else []
        pages += 1
    return seen, pages


async def test_every_stream_is_listed_with_its_place() -> None:
    limits = {"park_s": 100.0, "max_idle_s": 0.0}
    settings = {"heartbeat_s": 0.1}
    async with running(SMALL, limits=limits, transport=settings) as server, AsyncClient(server.endpoint) as client:
        await parked(server.endpoint, "old-1", "old-2")
        stream = await client.open("new-1")
        await stream.step(np.zeros((3, F)))
        found = {each.name: each for each in await client.list_streams()}
        assert found.keys() == {"old-1", "old-2", "new-1"}
        new, old = found["new-1"], found["old-2"]
        assert (new.place, new.next_seq, new.pending, new.expires_in_s) == ("connected", 3, 0, None)
        assert (old.place, old.next_seq) == ("parked", 1)
        assert old.expires_in_s is not None
        assert 90 < old.expires_in_s <= 100
        assert 0 <= new.idle_s < 10
        assert [each.name for each in await client.list_streams("new")] == ["new-1"]
        assert {each.name for each in await client.list_streams(place="parked")} == {"old-1", "old-2"}
        assert await client.list_streams("new", "parked") == []
        assert await client.list_streams(place="hibernating") == []
        with pytest.raises(InvalidInput):
            await client.list_streams(place="asleep")  # type: ignore[arg-type]
        with pytest.raises(InvalidInput):
            await client.list_streams("x" * 201)


async def test_streams_that_hibernate_are_listed_without_being_woken(tmp_path: Path) -> None:
    recording, limits = {"path": tmp_path / "r.instep"}, {"hibernate_after_s": 0.05}
    async with running(SMALL, recording=recording, limits=limits) as server, AsyncClient(server.endpoint) as client:
        streams_open = [await client.open(f"s{number}") for number in range(5)]
        await streams_open[0].step(np.zeros(F))
        while (await client.stats())["streams_hibernated"] < 5:
            await asyncio.sleep(0.01)
        woken = (await client.stats())["woken_streams_total"]
        found = await client.list_streams(place="hibernating")
        assert sorted(each.name for each in found) == ["s0", "s1", "s2", "s3", "s4"]
        assert {each.next_seq for each in found} == {None}
        async with RawClient(server.endpoint) as raw:
            await raw.hello()
            seen, pages = await all_pages(raw, 2, Place.HIBERNATING)
            assert sorted(seen) == ["s0", "s1", "s2", "s3", "s4"]
            assert pages >= 3, "of at most two streams"
        assert (await client.stats())["woken_streams_total"] == woken


@pytest.mark.parametrize("place", [0, Place.PARKED])
async def test_pages_hold_every_stream_once(place: int) -> None:
    async with running(SMALL, transport={"heartbeat_s": 0.1}) as server, RawClient(server.endpoint) as client:
        names = {f"s{number}" for number in range(20)}
        await parked(server.endpoint, *names)
        await client.hello()
        seen, pages = await all_pages(client, 3, place)
        assert sorted(seen) == sorted(names)
        assert pages >= 7, "of at most three streams"


class TestCommand:
    async def test_lists_closes_and_counts(self) -> None:
        async with running(SMALL, transport={"heartbeat_s": 0.1}) as server:
            target = Target(server.endpoint)
            await parked(server.endpoint, "old-1", "old-2", "old-3")
            async with AsyncClient(server.endpoint) as owner:
                mine = await owner.open("new-1")
                terminal = RememberingTerminal()
                assert await streams.show(target, terminal, Stop(), limit=3) == Exit.OK
                assert f"4 streams of {SMALL.name}; 1 more are not shown (--limit)" in terminal.said
                assert terminal.said.count("parked") == 3
                terminal = RememberingTerminal(as_json=True)
                assert await streams.close(target, terminal, Stop(), ["old-1", "gone"]) == 1
                assert terminal.json() == {"closed": ["old-1"], "missing": ["gone"]}
                terminal = RememberingTerminal()
                with pytest.raises(CommandProblem):
                    await streams.close(target, terminal, Stop(), ["old-2"], place="connected")
                assert await streams.close(target, terminal, Stop(), place="parked") == Exit.OK
                assert terminal.said.strip() == "2 streams closed"
                assert await streams.close(target, terminal, Stop(), pattern="n?w-*") == Exit.OK
                with pytest.raises(StreamEvicted) as evicted:
                    await mine.step(np.zeros(F))
                assert evicted.value.code is Code.BY_OPERATOR
                with pytest.raises(CommandProblem):
                    await streams.close(target, terminal, Stop())
                terminal = RememberingTerminal(as_json=True)
                assert await streams.show(target, terminal, Stop(), limit=3) == Exit.OK
                assert terminal.json() == {"model": SMALL.name, "streams": [], "count": 0}
                terminal = RememberingTerminal()
                assert await ping(target, terminal, Stop(), all=True) == Exit.OK
                assert "streams open" in terminal.said
                assert SMALL.name in terminal.said
