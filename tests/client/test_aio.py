"""AsyncClient against a real ROUTER. Rules are tested without sockets elsewhere; here it is that they are driven."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import uvloop

from instep_client import (
    AsyncClient,
    AsyncStream,
    ClientClosed,
    ConnectionFailed,
    ConnectionRefused,
    FramesRefused,
    InvalidInput,
    StepTimeout,
    StreamEvicted,
    StreamRefused,
)
from tests.support.fake_server import INFO, RING_INFO, FakeServer, reference

X = np.arange(300, dtype=np.float32).reshape(100, 3)


async def read_all(stream: AsyncStream) -> list[list[float]]:
    return [y.tolist() async for y in stream]


async def every_verb(endpoint: str) -> None:
    async with AsyncClient(endpoint, "tester") as client:
        assert client.info == INFO
        assert 0 < await client.ping() < 10
        assert (await client.stats())["streams_open"] == 0
        state = np.full((2, 2), 8, np.float32)
        stream = await client.open("a", state)
        outputs, final = reference(X[:20], state)
        assert stream.name == "a"
        assert (await stream.step(X[0])).tolist() == outputs[0].tolist()
        assert (await stream.step(X[1:5])).tolist() == outputs[1:5].tolist()
        answer = await stream.step_timed(X[5])
        assert answer.outputs.tolist() == outputs[5].tolist()
        assert (answer.queue_us, answer.compute_us, answer.send_us) == (7, 8, 9)
        for x in X[6:20]:
            await stream.send(x)
        stream.finish()
        assert await read_all(stream) == outputs[6:].tolist()
        assert stream.next_seq == 20
        assert (await stream.close())["h"].tolist() == final.tolist()

        group = await client.open_group(["b", "c", "d"], np.zeros((3, 2, 2)))
        assert len(group) == 3
        assert group.names == ("b", "c", "d")
        assert (await group.step(X[:3])).shape == (3, 2)
        assert (await group.step(X[:6].reshape(2, 3, 3))).shape == (2, 3, 2)
        assert (await group.step_timed(X[:1], rows=[2])).outputs.shape == (1, 2)
        assert group.next_seqs.tolist() == [3, 3, 4]
        finals = await group.close()
        assert finals["h"][2].tolist() == reference(X[[2, 2, 5, 0]])[1].tolist()


@pytest.mark.parametrize("loop_factory", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_every_verb_on_both_loops(server: FakeServer, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(every_verb(server.endpoint))
    assert server.rules.names == {}


async def test_what_many_tasks_step_in_the_same_turn_is_one_block(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        streams = [await client.open(f"s{i}") for i in range(50)]
        for step in range(3):
            outputs = await asyncio.gather(*[stream.step(x) for stream, x in zip(streams, X, strict=False)])
            assert len(outputs) == 50
            assert server.rules.blocks == [(1, 50)] * (step + 1)
        for stream, x, y in zip(streams, X, outputs, strict=False):
            assert y.tolist() == reference(np.stack([x] * 3))[0][2].tolist()
            assert stream.next_seq == 3


async def test_of_many_calls_of_one_turn_the_first_are_sent_before_the_others_are_made(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        streams = [await client.open(f"s{i}") for i in range(300)]
        outputs = await asyncio.gather(*[stream.step(X[i % 100]) for i, stream in enumerate(streams)])
        assert server.rules.blocks == [(1, 128), (1, 128), (1, 44)]
    assert np.stack(outputs).tolist() == [reference(X[i % 100, None])[0][0].tolist() for i in range(300)]


async def test_sends_wait_for_credit_and_nothing_queues_behind_them() -> None:
    with FakeServer(replace(INFO, credit_frames=8)) as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("a")
            server.rules.holding = True
            sent = 0

            async def send_and_count() -> None:
                nonlocal sent
                for x in X:
                    await stream.send(x)
                    sent += 1

            sender = asyncio.create_task(send_and_count())
            while len(server.rules.held) < 8:
                await asyncio.sleep(0.001)
            await client.ping()
            assert stream.next_seq == sent == 8
            server.release()
            outputs = [await anext(stream) for _ in X]
            await sender
            assert np.stack(outputs).tolist() == reference(X)[0].tolist()


async def test_refused_frames_are_raised_at_their_place_and_reading_goes_on(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        server.rules.holding = True
        for x in (X[0], [np.nan, 0, 0], X[1]):
            await stream.send(x)
        server.release()
        told = [(await anext(stream)).tolist()]
        with pytest.raises(FramesRefused):
            await read_all(stream)
        with pytest.raises(FramesRefused):
            await anext(stream)
        await stream.send(X[2])
        stream.finish()
        assert told + await read_all(stream) == reference(X[[0, 2]])[0].tolist()


async def test_a_cancelled_step_counts_as_sent(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        server.rules.holding = True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.step(X[0])
        server.release()
        assert (await stream.step(X[1])).tolist() == reference(X[:2])[0][1].tolist()
        assert stream.next_seq == 2


async def test_a_step_that_is_late_says_whether_its_frames_were_sent() -> None:
    with FakeServer(RING_INFO) as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("a")
            assert (await stream.step(X[0], timeout_s=60)).tolist() == [3, 4]
            server.rules.holding = True
            with pytest.raises(StepTimeout) as late:
                await stream.step(X[1], timeout_s=0.05)
            assert (late.value.sent, stream.next_seq) == (True, 2)
            with pytest.raises(StepTimeout) as late:
                await stream.step(X[2:20], timeout_s=0.05)
            assert (late.value.sent, stream.next_seq) == (True, 6), "the window is full with the first of these"
            with pytest.raises(StepTimeout) as late:
                await stream.step(X[6:10], timeout_s=0.05)
            assert (late.value.sent, stream.next_seq) == (False, 6)
            with pytest.raises(InvalidInput):
                await stream.step(X[6], timeout_s=0)
            server.release()
            assert (await stream.step(X[6])).tolist() == reference(X[:7])[0][6].tolist()


async def test_refusals_and_bad_input(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        with pytest.raises(StreamRefused):
            await client.open("a")
        for x in (np.zeros(2), ["a", "b", "c"], [1e39, 0, 0]):
            with pytest.raises(InvalidInput):
                await stream.step(x)
        with pytest.raises(InvalidInput):
            await client.open_group("ab")
        assert (await stream.step(X[0])).tolist() == [3, 4]


async def test_eviction_ends_calls_and_readers(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        server.rules.holding = True
        step = asyncio.create_task(stream.step(X[0]))
        reader = asyncio.create_task(read_all(stream))
        while not server.rules.held:
            await asyncio.sleep(0.001)
        server.evict(["a"])
        for work in (step, reader, stream.step(X[0]), stream.send(X[0]), stream.close()):
            with pytest.raises(StreamEvicted):
                await work
        assert await client.ping() > 0


async def test_a_server_that_is_not_there_is_waited_for_only_if_asked(tmp_path: Path) -> None:
    with FakeServer() as server:
        endpoint = server.endpoint
    for nowhere in (endpoint, f"ipc://{tmp_path}/none", "tcp://localhost:1"):
        with pytest.raises(ConnectionRefused):
            await AsyncClient(nowhere).connect()
        client = AsyncClient(nowhere, timeout_s=0.2, wait=True)
        with pytest.raises(ConnectionFailed):
            await client.connect()
    gc.collect()


async def test_a_client_connects_once(server: FakeServer) -> None:
    client = AsyncClient(server.endpoint)
    with pytest.raises(ClientClosed):
        await client.open("a")
    await client.connect()
    with pytest.raises(ClientClosed):
        await client.connect()
    assert await client.ping() < 10
    await client.close()
    await client.close()
    with pytest.raises(ClientClosed):
        await client.ping()
    never = AsyncClient(server.endpoint)
    await never.close()
    with pytest.raises(ClientClosed):
        await never.connect()


async def test_closing_fails_what_waits_and_closes_the_streams(server: FakeServer) -> None:
    client = AsyncClient(server.endpoint)
    await client.connect()
    stream = await client.open("a")
    server.rules.holding = True
    waiting = [asyncio.create_task(work) for work in (stream.step(X[0]), read_all(stream))]
    await asyncio.sleep(0)
    await client.close()
    for task in waiting:
        with pytest.raises(ClientClosed):
            await task
    assert server.rules.names == {}


async def test_a_host_that_is_not_known_is_waited_for_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = [socket.EAI_NONAME]

    def find(*address: object, **wanted: object) -> None:
        raise socket.gaierror(reasons[0], "as the system says")

    monkeypatch.setattr(socket, "getaddrinfo", find)
    unknown = "tcp://nohost.invalid:5757"
    with pytest.raises(ConnectionFailed):
        await AsyncClient(unknown).connect()
    with pytest.raises(ConnectionFailed):
        await AsyncClient(unknown, timeout_s=0.2, wait=True).connect()
    reasons[0] = socket.EAI_AGAIN  # which may pass
    with pytest.raises(ConnectionFailed):
        await AsyncClient(unknown, timeout_s=0.2).connect()
    gc.collect()
