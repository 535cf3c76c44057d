"""A server that is one of several shards, by a client that speaks the protocol itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep.frontends.shards import Shard, for_table
from instep.recording.writer import Statement
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind, ShardTable
from tests.support.keys import KeyRing
from tests.support.models import SMALL
from tests.support.raw import RawClient, Reply
from tests.support.running import running

NAMES = ("mic-1", "mic-2", "stream-000123", "mic-4", "straße/7")
"""Of 4 shards they belong to 0, 2, 2, 3 and 1, as docs/protocol.md says."""
ELSEWHERE = [(0, 0, Code.WRONG_SHARD, 0), (3, 0, Code.WRONG_SHARD, 3), (4, 0, Code.WRONG_SHARD, 1)]


def shard_2_of_4() -> Shard:
    return Shard(2, 4, 7)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(SMALL, shard=shard_2_of_4()) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[RawClient]:
    async with RawClient(server.endpoint) as client:
        await client.hello()
        yield client


def sharded(reply: Reply) -> tuple[list[int], list[str]]:
    """The terms and endpoints of SHARDED."""
    assert reply.kind is Kind.SHARDED
    terms = np.frombuffer(reply.frames[0], "<u8").tolist()
    assert reply.header[2:] == [len(terms)]
    return terms, reply.frames[1].decode().split("\n")


async def ask_for_table(client: RawClient) -> Reply:
    return await client.ask(msgpack.packb([Kind.SHARDS, client.next_request()]))


async def remove(client: RawClient, *names: str) -> Reply:
    header = msgpack.packb([Kind.REMOVE, client.next_request(), len(names), 0])
    reply = await client.ask(header, "\n".join(names).encode())
    return reply if reply.request else await client.receive()  # EVICTED comes first, as they are this client's


async def test_welcome_says_which_shard_a_server_is() -> None:
    for shard, elements in ((None, [0, 1, 0]), (shard_2_of_4(), [2, 4, 7])):
        async with running(SMALL, shard=shard) as server, RawClient(server.endpoint) as client:
            assert (await client.hello()).header[-3:] == elements


async def test_names_of_other_shards_are_refused_with_the_number_of_theirs(client: RawClient) -> None:
    for reply in (
        await client.open(*NAMES),
        await client.resume(NAMES, [0] * 5, [0] * 5, take_over=True),
        await client.ask(*client.read_named_message(NAMES)),
        await remove(client, *NAMES),
    ):
        assert reply.failures() == ELSEWHERE
    assert (await client.open("mic-2", "stream-000123")).failures() == []  # they were removed


async def test_a_copy_is_refused_by_its_own_name(client: RawClient) -> None:
    handle = int((await client.open("mic-2")).handles()[0])
    for name, shard in (("mic-4", 3), ("straße/7", 1)):
        assert (await client.fork([handle], [name])).failures() == [(0, 0, Code.WRONG_SHARD, shard)]
    assert (await client.fork([handle], ["stream-000123"])).failures() == []


async def test_an_unknown_name_of_this_shard_is_not_sent_elsewhere(client: RawClient) -> None:
    reply = await client.resume(["mic-2", "mic-1"], [0, 0], [0, 0])
    assert reply.failures() == [(0, 0, Code.UNKNOWN_STREAM, 0), (1, 0, Code.WRONG_SHARD, 0)]


async def test_the_newest_table_is_given_to_whoever_asks(server: Server, client: RawClient) -> None:
    endpoints = ("tcp://10.0.0.1:5757", "tcp://*:5758", server.endpoint, "")
    server.models.shard.table = ShardTable(np.array([3, 1, 7, 4], np.uint64), endpoints)
    assert sharded(await ask_for_table(client)) == ([3, 1, 7, 4], list(endpoints))


async def test_a_server_on_its_own_is_its_whole_table_and_takes_every_name() -> None:
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        assert (await ask_for_table(client)).code is Code.HELLO_FIRST
        await client.hello()
        assert sharded(await ask_for_table(client)) == ([0], [server.endpoint])
        assert (await client.open(*NAMES)).failures() == []
        assert (await client.resume(["nobody"], [0], [0])).codes() == [Code.UNKNOWN_STREAM]


@pytest.mark.parametrize("at", [lambda name: name, lambda name: f"{name}/x"])
async def test_a_shard_is_named_whether_the_name_is_allowed_or_not(tmp_path: Path, at: Callable[[str], str]) -> None:
    keys = KeyRing(tmp_path, mine={"role": "operator", "streams": [at("mic-*"), at("stra*")]})
    async with (
        running(SMALL, shard=shard_2_of_4(), transport=keys.transport) as server,
        RawClient(server.endpoint, curve=keys.curve("mine")) as client,
    ):
        await client.hello()
        for reply in (await client.open(*NAMES), await client.resume(NAMES, [0] * 5, [0] * 5)):
            assert [failure for failure in reply.failures() if failure[2] is Code.WRONG_SHARD] == ELSEWHERE


@dataclass
class Place:
    """A second place that takes everything."""

    is_used: bool = True

    def commit(self, file: Path, statements: Sequence[Statement], here: Callable[[], object]) -> None:
        here()

    def barrier(self) -> None:
        pass

    def copy_wal(self, file: Path) -> None:
        pass


async def test_the_numbers_of_a_shard_tell_whether_it_has_a_copy(tmp_path: Path) -> None:
    recording, place = {"path": tmp_path / "r.instep"}, Place()
    async with running(SMALL, recording=recording) as lone, RawClient(lone.endpoint) as client:
        await client.hello()
        assert "copied" not in await client.statistics()
    async with (
        running(SMALL, shard=Shard(2, 4, 7, second_place=place), recording=recording) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        assert (await client.statistics())["copied"] == 1
        place.is_used = False
        assert (await client.statistics())["copied"] == 0


@pytest.mark.parametrize(
    ("endpoint", "listed"),
    [
        ("tcp://0.0.0.0:5757", "tcp://*:5757"),
        ("tcp://[::]:5757", "tcp://*:5757"),
        ("tcp://10.0.0.0:5757", "tcp://10.0.0.0:5757"),
        ("ipc:///run/instep.2", "ipc:///run/instep.2"),
        ("ipc://run/instep.2", f"ipc://{Path.cwd()}/run/instep.2"),
        ("ipc://@instep.2", "ipc://@instep.2"),
    ],
)
def test_a_table_has_endpoints_that_clients_elsewhere_can_use(endpoint: str, listed: str) -> None:
    assert for_table(endpoint) == listed
