"""One client of several shards: groups over real ones, and where it goes when a server is lost."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from random import Random
from socket import create_server
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from instep.frontends.shards import Shard
from instep.server.server import Server
from instep_client import (
    AsyncClient,
    Client,
    ClientClosed,
    Code,
    ConnectionFailed,
    ConnectionRefused,
    FramesRefused,
    HandshakeFailed,
    StepTimeout,
    StreamEvicted,
    StreamRefused,
)
from instep_client.protocol.wire import Kind, ShardTable
from tests.support.fake_server import RING_INFO, FakeServer, error, fake_shards, goodbye, reference
from tests.support.keys import KeyRing
from tests.support.models import SMALL, torch_gru
from tests.support.running import running

NAMES = [f"mic-{number}" for number in range(10)]
RNG = np.random.default_rng(5)
X = RNG.standard_normal((4, len(NAMES), 5)).astype(np.float32)


def shard_of(name: str, shards: int) -> int:
    return zlib.crc32(name.encode()) % shards


def name_like(name: str, shard: int) -> str:
    """A name of that shard of 3."""
    return next(each for each in (f"{name}-{number}" for number in range(99)) if shard_of(each, 3) == shard)


@asynccontextmanager
async def shards(count: int, **sections: Any) -> AsyncIterator[list[Server]]:
    """Real servers, which share a table once all of them listen."""
    places = [Shard(number, count) for number in range(count)]
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running(SMALL, shard=place, **sections)) for place in places]
        for place in places:
            place.table = ShardTable(np.zeros(count, np.uint64), tuple(server.endpoint for server in servers))
        yield servers


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    async with shards(3) as servers, AsyncClient(servers[1].endpoint) as client:
        yield client


async def test_a_group_over_shards_is_as_one_of_a_single_server(client: AsyncClient) -> None:
    assert {shard_of(name, 3) for name in NAMES} == {0, 1, 2}
    async with running(SMALL) as server, AsyncClient(server.endpoint) as alone:
        groups = [await each.open_group(NAMES) for each in (client, alone)]
        answers = [[await group.step(X), await group.step(X[0, [7, 2, 5]], rows=[7, 2, 5])] for group in groups]
        for one, other in zip(*answers, strict=True):
            assert one.tobytes() == other.tobytes()
        with torch.no_grad():
            truth = torch_gru(SMALL)(torch.from_numpy(X))[0].numpy()
        assert np.allclose(answers[0][0], truth, atol=1e-5)
        group, single = groups
        assert group.names == single.names == tuple(NAMES)
        assert repr(group) == repr(single)
        assert group.next_seqs.tolist() == single.next_seqs.tolist() == [4, 4, 5, 4, 4, 5, 4, 5, 4, 4]
        assert (group.moved_at == -1).all()
        given = RNG.standard_normal((len(NAMES), 1, 8)).astype(np.float32)
        for each in groups:
            await each.reset(given)
        (seqs, state), (_, same) = [await each.read_state() for each in groups]
        assert seqs.tolist() == group.next_seqs.tolist()
        assert state["h"].tobytes() == same["h"].tobytes() == given.tobytes()
        finals = [await each.close() for each in groups]
        assert finals[0]["h"].tobytes() == given.tobytes()


async def test_streams_are_continued_where_their_names_belong(client: AsyncClient) -> None:
    group = await client.open_group(NAMES, {"h": np.ones((len(NAMES), 1, 8), np.float32)})
    await group.step(X)
    again = await client.resume_group(NAMES, group.next_seqs, group.epochs)
    assert again.next_seqs.tolist() == [4] * len(NAMES)
    assert (again.epochs > group.epochs).all()
    with pytest.raises(StreamEvicted):
        await group.step(X)
    stream = await client.resume(NAMES[3], take_over=True)
    assert (await client.read_state(NAMES[3]))[0] == stream.next_seq == 4
    copy = await client.restore(await client.snapshot(NAMES[3]), "copy")
    assert (await copy.step(X[0, 0])).tobytes() == (await stream.step(X[0, 0])).tobytes()


async def test_a_copy_stays_in_its_shard(client: AsyncClient) -> None:
    group = await client.open_group(NAMES)
    names = [name_like(name, shard_of(name, 3)) for name in NAMES]
    await group.step(X)
    copies = await group.fork(names)
    assert copies.next_seqs.tolist() == [4] * len(NAMES)
    assert (await copies.step(X)).tobytes() == (await group.step(X)).tobytes()
    await copies.close()
    with pytest.raises(StreamRefused) as refused:
        await group.fork([*names[:-1], name_like("x", (shard_of(NAMES[-1], 3) + 1) % 3)])
    assert refused.value.code is Code.WRONG_SHARD
    assert sorted(stream.name for stream in await client.list_streams()) == sorted(NAMES)


async def test_a_group_over_shards_is_opened_whole_or_not_at_all(client: AsyncClient) -> None:
    await client.open(NAMES[4])
    with pytest.raises(StreamRefused) as refused:
        await client.open_group(NAMES)
    assert (refused.value.code, refused.value.stream) == (Code.NAME_IN_USE, NAMES[4])
    assert [stream.name for stream in await client.list_streams()] == [NAMES[4]]


async def test_outputs_of_other_shards_are_kept_when_one_refuses_frames(client: AsyncClient) -> None:
    group = await client.open_group(NAMES)
    bad = X.copy()
    bad[2, 3] = bad[1, 8] = np.nan
    with pytest.raises(FramesRefused) as refused:
        await group.step(bad)
    assert [(each.stream, each.seq) for each in refused.value.failures] == [(NAMES[3], 2), (NAMES[8], 1)]
    missing = np.isnan(refused.value.outputs).all(axis=-1)
    assert np.argwhere(missing).tolist() == [[1, 8], [2, 3], [2, 8], [3, 3], [3, 8]]
    assert await client.remove_streams([NAMES[6], "nobody"]) == ["nobody"]
    with pytest.raises(StreamEvicted) as evicted:
        await group.step(X)
    assert (evicted.value.code, evicted.value.stream) == (Code.BY_OPERATOR, NAMES[6])
    before = group.next_seqs
    with pytest.raises(StreamEvicted) as evicted:
        await group.step(X)
    assert evicted.value.outputs is None
    assert group.next_seqs.tolist() == before.tolist()
    finals = await group.close()
    assert np.flatnonzero(np.isnan(finals["h"]).all(axis=(1, 2))).tolist() == [6]


async def test_all_shards_are_asked_about_the_server(client: AsyncClient) -> None:
    group = await client.open_group(NAMES)
    await group.step(X)
    assert sorted(stream.name for stream in await client.list_streams()) == sorted(NAMES)
    assert [stream.name for stream in await client.list_streams(NAMES[2])] == [NAMES[2]]
    (model,) = await client.list_models()
    assert (model.name, model.streams, model.frames, model.connections) == (SMALL.name, len(NAMES), X[..., 0].size, 3)
    numbers = await client.stats()
    assert (numbers["frames_total"], numbers["streams_open"], numbers["ready"]) == (X[..., 0].size, len(NAMES), 1)
    assert await client.ping() < 10
    assert (client.info.shard, client.info.shards) == (1, 3)


async def test_numbers_of_shards_are_added_up_or_the_largest_or_the_smallest() -> None:
    most = ("latency_us_p99", "recent_batch_size_mean", "uptime_s", "recent_loop_busy", "step_time_ratio")
    sums = ("frames_total", "loop_busy_s_total", "recent_frames_per_s", "recording_bytes", "streams_parked")
    least = ("ready", "exact", "recording_free_bytes")
    with fake_shards((0, 0), (1, 0)) as (first, other):
        for server, number in ((first, 3.0), (other, 4.0)):
            server.rules.numbers = dict.fromkeys((*most, *sums, *least), number)
        other.rules.numbers["only_here_total"] = 1.0
        async with AsyncClient(other.endpoint) as client:
            numbers = await client.stats()
    for names, value in ((most, 4), (sums, 7), (least, 3), (("only_here_total",), 1)):
        assert [numbers[name] for name in names] == [value] * len(names)


async def test_one_key_opens_all_shards(tmp_path: Path) -> None:
    keys = KeyRing(tmp_path, mic={})
    own = keys.of_client("mic")
    async with shards(2, transport=keys.transport) as servers, AsyncClient(servers[0].endpoint, **own) as client:
        assert (await (await client.open_group(NAMES)).step(X)).shape == (*X.shape[:2], 8)
        numbers = await client.stats()
    assert numbers['principal_frames_total{principal="mic"}'] == X[..., 0].size


async def test_of_several_endpoints_the_one_that_wants_a_key_is_named(tmp_path: Path) -> None:
    async with shards(1, transport=KeyRing(tmp_path, mic={}).transport) as (server,):
        for endpoints in (f"{closed_port()},{server.endpoint}", f"{server.endpoint},{closed_port()}"):
            with pytest.raises(HandshakeFailed) as wanted:
                await AsyncClient(endpoints, reconnect_s=0.3).connect()
            assert server.endpoint in str(wanted.value)


async def test_threads_use_groups_over_shards() -> None:
    async with shards(3) as servers:

        def work() -> tuple[list[int], tuple[int, ...]]:
            with Client(servers[0].endpoint) as client:
                group = client.open_group(NAMES)
                outputs = group.step(X)
                stream = client.open("stream")
                return group.next_seqs.tolist(), (*outputs.shape, stream.next_seq, len(group))

        assert await asyncio.to_thread(work) == ([4] * len(NAMES), (*X.shape[:2], 8, 0, len(NAMES)))


# ── Endpoints, and servers that are lost ───────────────────────────────────────────────────────────────────────────


def closed_port() -> str:
    with closing(create_server(("127.0.0.1", 0))) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_one_of_several_endpoints_has_to_answer(server: FakeServer) -> None:
    dead = closed_port()
    with Client(f"{dead}, {dead},{server.endpoint}") as client:
        assert client.open("a").next_seq == 0
    with pytest.raises(ConnectionRefused) as refused:
        Client(f"{dead},{closed_port()}", reconnect_s=0.0).connect()
    assert dead in str(refused.value)


async def test_several_endpoints_are_tried_until_one_answers() -> None:
    with FakeServer() as late:
        late.rules.fault = lambda header, frames: [error(header[1], Code.SHUTTING_DOWN)]  # as while its shard moves
        client = AsyncClient(f"{closed_port()},{late.endpoint}")
        connecting = asyncio.create_task(client.connect())
        while Kind.HELLO not in late.rules.kinds:
            await asyncio.sleep(0.01)
        assert not connecting.done()
        late.rules.fault = None
        await connecting
        await client.close()


async def test_of_two_servers_that_answer_at_once_one_is_left() -> None:
    with FakeServer() as first, FakeServer() as other:
        ports = {int(server.endpoint.rpartition(":")[2]) for server in (first, other)}
        client = AsyncClient(f"{first.endpoint},{other.endpoint}")
        with first.paused(), other.paused():
            connecting = asyncio.create_task(client.connect())
            await asyncio.sleep(0.5)
        time.sleep(0.5)  # noqa: ASYNC251  # so that the client finds two answers
        await connecting
        with pytest.raises(ClientClosed):
            await client.connect()
        async with asyncio.timeout(20):
            while sum(each.raddr[1:] in {(port,) for port in ports} for each in psutil.Process().net_connections()) > 1:
                await asyncio.sleep(0.05)
        assert (await client.open("a")).next_seq == 0
        await client.close()


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.RESUME])
async def test_what_a_server_refuses_because_its_shard_moves_is_asked_of_the_next_one(kind: Kind) -> None:
    with fake_shards((0, 1), (1, 1), (0, 2)) as (first, other, successor):
        async with AsyncClient(first.endpoint) as client:
            await client.open(OF_0)
            first.rules.draining = True
            begin = client.open("d") if kind is Kind.OPEN else client.resume(OF_0, take_over=True)
            beginning = asyncio.create_task(begin)
            while first.rules.kinds[-1] is not kind:
                await asyncio.sleep(0.01)
            successor.rules.take_over_from(first.rules)
            other.rules.table[0] = (2, successor.endpoint)
            first.push(goodbye())
            assert (await beginning).next_seq == 0
            assert kind in successor.rules.kinds


async def test_a_shard_that_only_refuses_is_given_up_in_time() -> None:
    with fake_shards((0, 1), (1, 1)) as (first, _):
        async with AsyncClient(first.endpoint, reconnect_s=0.3) as client:
            first.rules.draining = True
            with pytest.raises(StreamRefused) as refused:
                await client.open("d")
    assert refused.value.code is Code.SHUTTING_DOWN


OF_0, OF_1 = "mic-1", "mic-4"
FRAMES = RNG.standard_normal((12, 3)).astype(np.float32)


def fall_silent(server: FakeServer) -> None:
    server.do(lambda: setattr(server.rules, "fault", lambda header, frames: []))


def say_goodbye(server: FakeServer) -> None:
    server.do(server.rules.shut_down)
    server.push(goodbye())


@pytest.mark.parametrize(
    ("end", "term", "connections"),
    [(fall_silent, 1, 2), (fall_silent, 2, 1), (say_goodbye, 1, 1), (say_goodbye, 2, 2)],
)
async def test_a_client_goes_where_any_server_says_that_another_one_is(
    end: Callable[[FakeServer], object], term: int, connections: int
) -> None:
    with fake_shards((0, 1), (1, 1), (0, term)) as (first, other, successor):
        async with AsyncClient(first.endpoint) as client:
            stream, *elsewhere = [await client.open(name) for name in (OF_0, OF_1)[:connections]]
            outputs = [await stream.step(x) for x in FRAMES[:6]]
            successor.rules.take_over_from(first.rules)
            end(first)
            other.rules.table[0] = (term, successor.endpoint)
            outputs += [await stream.step(x) for x in FRAMES[6:]]
            assert np.array_equal(np.array(outputs), reference(FRAMES)[0])
            assert [(await each.step(FRAMES[:2])).shape for each in elsewhere] == [(2, 2)] * (connections - 1)
            assert client.is_connected


async def test_a_server_that_is_well_is_left_for_one_of_a_higher_term() -> None:
    with fake_shards((0, 1), (1, 1), (0, 2)) as (first, other, successor):
        async with AsyncClient(first.endpoint) as client:
            stream, elsewhere = await client.open(OF_0), await client.open(OF_1)
            await stream.step(FRAMES[0])
            successor.rules.take_over_from(first.rules)
            first.rules.table[0] = (2, successor.endpoint)
            other.do(other.rules.restart)  # so that the client asks the first where the second shard is
            with other.paused():
                step = asyncio.create_task(elsewhere.step(FRAMES[0]))
                while Kind.RESUME not in successor.rules.kinds:
                    await asyncio.sleep(0.01)
            await step
            assert np.array_equal(await stream.step(FRAMES[1:]), reference(FRAMES)[0][1:])


async def test_a_cancelled_step_or_opening_of_two_shards_leaves_both_in_order() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, other):
        async with AsyncClient(first.endpoint) as client:
            group = await client.open_group([OF_0, OF_1])
            x = np.stack([FRAMES, FRAMES], 1)
            with other.paused():
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await group.step(x[0])
                assert group.next_seqs.tolist() == [1, 1]
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await client.open_group(["b", OF_1 + "b"])
            while not all(Kind.CLOSE in server.rules.kinds for server in (first, other)):
                await asyncio.sleep(0.01)
            await client.open_group(["b", OF_1 + "b"])
            assert np.array_equal(await group.step(x[1:]), np.stack([reference(FRAMES)[0][1:]] * 2, 1))


async def test_a_late_step_of_two_shards_keeps_what_one_of_them_did() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, other):
        async with AsyncClient(first.endpoint) as client:
            group = await client.open_group([OF_0, OF_1])
            x = np.stack([FRAMES, FRAMES], 1)
            with other.paused():
                with pytest.raises(StepTimeout) as late:
                    await group.step(x[0], timeout_s=0.2)
                assert (late.value.sent, group.next_seqs.tolist()) == (True, [1, 1])
            assert np.array_equal(await group.step(x[1:]), np.stack([reference(FRAMES)[0][1:]] * 2, 1))


async def test_a_copy_of_the_only_shard_is_found_at_the_other_endpoint() -> None:
    info = replace(RING_INFO, term=1)
    with FakeServer(info) as first, FakeServer(replace(info, term=2)) as successor:
        first.rules.table, successor.rules.table = [(1, first.endpoint)], [(2, successor.endpoint)]
        async with AsyncClient(f"{first.endpoint},{successor.endpoint}") as client:
            stream = await client.open(OF_0)
            successor.rules.take_over_from(first.rules)
            fall_silent(first)
            assert np.array_equal(await stream.step(FRAMES), reference(FRAMES)[0])


async def test_tables_and_servers_of_a_lower_term_are_not_followed() -> None:
    with fake_shards((0, 2), (1, 1), (0, 3), (0, 1)) as (first, other, successor, former):
        async with AsyncClient(first.endpoint) as client:
            stream, _ = await client.open(OF_0), await client.open(OF_1)
            other.rules.table[0] = (1, former.endpoint)
            first.do(first.rules.restart)
            await stream.step(FRAMES[0])
            first.rules.info = replace(first.rules.info, term=1)  # as if a server of long ago had come back there
            successor.rules.take_over_from(first.rules)
            first.do(first.rules.restart)
            waiting = asyncio.create_task(stream.step(FRAMES[1:]))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            other.rules.table[0] = (3, successor.endpoint)
            assert np.array_equal(await waiting, reference(FRAMES)[0][1:])
        assert former.rules.kinds == []


async def test_a_shard_that_was_given_up_costs_the_others_nothing_and_is_tried_again() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, other):
        for lost, kept, ended in ((first, other, OF_0), (other, first, OF_1)):
            names = sorted([OF_0, OF_1], key=lambda name: name == ended)
            async with AsyncClient(first.endpoint, reconnect_s=0.0) as client:
                group = await client.open_group(names)
                say_goodbye(lost)
                with pytest.raises(ConnectionFailed, match=f"shard {lost.rules.info.shard}"):
                    await group.step(np.stack([FRAMES, FRAMES], 1))
                assert (await group.step(FRAMES[:1], rows=[0])).shape == (1, 2)
                for call in (group.close, group.reset):
                    with pytest.raises(ConnectionFailed):
                        await call()
                assert list(kept.rules.names) == names[:1]
                await at(lost, lost.rules.restart)
                assert await client.ping() < 10
                await (await client.resume_group(names, take_over=True)).close()
                assert client.is_connected


async def test_another_number_of_shards_ends_the_client() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, other):
        async with AsyncClient(first.endpoint) as client:
            stream = await client.open(OF_1)
            other.rules.info = replace(other.rules.info, shards=3)
            other.do(other.rules.restart)
            with pytest.raises(ConnectionFailed, match=r"2 .* 3"):
                await stream.step(FRAMES[0])


async def test_a_shard_that_nobody_serves_is_waited_for() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, other):
        first.rules.table[1] = (0, "")
        async with AsyncClient(first.endpoint, reconnect_s=0.0) as client:
            with pytest.raises(ConnectionFailed):
                await client.open(OF_1)
        async with AsyncClient(first.endpoint) as client:
            opening = asyncio.create_task(client.open_group([OF_0, OF_1]))
            await asyncio.sleep(0.4)
            assert not opening.done()
            first.rules.table[1] = (0, other.endpoint)
            assert (await (await opening).step(FRAMES[:2])).shape == (2, 2)


async def at(server: FakeServer, change: Callable[[], object]) -> None:
    """Have something done between two messages of a server."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    server.do(change)
    server.do(lambda: loop.call_soon_threadsafe(done.set))
    await done.wait()


def only_greets(header: list[Any], frames: list[bytes]) -> list[list[bytes]] | None:
    """What a server answers whose place was taken: nothing that rests on its recording."""
    return None if header[0] in (Kind.HELLO, Kind.SHARDS) else []


async def test_every_output_comes_once_while_shards_move_at_random() -> None:
    random, done = Random(0), False
    with fake_shards((0, 1), (1, 1), (0, 0), (1, 0)) as servers:
        now, table = list(servers[:2]), list(servers[0].rules.table)

        async def produce(names: list[str]) -> None:
            async with AsyncClient(",".join(server.endpoint for server in now), timeout_s=6.0) as client:
                x = np.random.default_rng(len(names)).standard_normal((3000, len(names), 3)).astype(np.float32)
                group, outputs = await client.open_group(names), list[Any]()
                while not done and len(outputs) < len(x):
                    outputs.append(await group.step(x[len(outputs)]))
                    await asyncio.sleep(random.uniform(0.0, 0.02))
            for index in range(len(names)):
                assert np.array_equal(np.array(outputs)[:, index], reference(x[: len(outputs), index])[0])

        def share(to: list[FakeServer]) -> None:
            for server in to:
                server.rules.table = list(table)

        async def move(shard: int) -> None:
            former, (successor,) = now[shard], {*servers[shard::2]} - {now[shard]}
            await at(former, lambda: setattr(former.rules, "fault", lambda header, frames: []))
            term = table[shard][0] + 1
            table[shard] = random.choice([table[shard], (term, "")])
            share(random.sample(servers, 2))
            await asyncio.sleep(random.uniform(0.0, 1.5))
            successor.rules.info = replace(successor.rules.info, term=term)
            await at(successor, lambda: successor.rules.take_over_from(former.rules))
            successor.rules.fault = None
            now[shard], table[shard] = successor, (term, successor.endpoint)
            share(random.sample(servers, 2))
            former.rules.fault = only_greets  # where both servers that a client knows are silent, nobody tells it more
            if random.random() < 0.5:
                former.rules.streams = {}
                await at(former, former.rules.restart)
            await asyncio.sleep(random.uniform(0.0, 0.5))
            share(servers)

        producing = [asyncio.create_task(produce([f"{size}-{at}" for at in range(size)])) for size in (1, 2, 7)]
        for _ in range(5):
            await asyncio.sleep(random.uniform(0.0, 0.5))
            shard = random.randrange(2)
            if random.random() < 0.7:
                await move(shard)
            else:
                await at(now[shard], now[shard].rules.restart)
        done = True
        await asyncio.gather(*producing)
        assert max(term for term, _ in table) > 1
