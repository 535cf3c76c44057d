"""A producer that died and comes back opens its streams by name, in one call."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep_client import AsyncClient, Client, InvalidInput, StreamEvicted, StreamRefused
from instep_client.aio import IfExists
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, whole
from tests.support.relay import Relay
from tests.support.running import running
from tests.support.streaming import random_frames

F = 5


async def test_a_stream_that_was_left_parked_is_resumed_or_replaced(rng: np.random.Generator) -> None:
    x = random_frames(rng, 6)[:, 0]
    y = whole(SMALL, x)[0]
    async with running(SMALL) as server:
        async with AsyncClient(server.endpoint) as client:
            died = await client.open("mic-7", if_exists="resume")
            np.testing.assert_array_equal(await died.step(x[:4]), y[:4])
            await client.close(park=True)
        async with AsyncClient(server.endpoint) as client:
            with pytest.raises(StreamRefused) as refused:
                await client.open("mic-7")
            assert refused.value.code is Code.NAME_IN_USE
            stream = await client.open("mic-7", if_exists="resume")
            assert stream.next_seq == 4
            np.testing.assert_array_equal(await stream.step(x[4:]), y[4:])
            anew = await client.open("mic-7", if_exists="replace")
            assert anew.next_seq == 0
            np.testing.assert_array_equal(await anew.step(x), y)
            with pytest.raises(StreamEvicted):
                await stream.step(x[0])
            with pytest.raises(InvalidInput):
                await client.open("mic-8", if_exists="ignore")  # type: ignore[arg-type]


async def test_a_stream_that_another_client_has_is_taken_over() -> None:
    async with running(SMALL) as server, AsyncClient(server.endpoint) as one, AsyncClient(server.endpoint) as other:
        mine = await one.open("mic-7")
        await mine.step(np.zeros(F))
        theirs = await other.open("mic-7", if_exists="resume")
        assert theirs.next_seq == 1
        with pytest.raises(StreamEvicted) as evicted:
            await mine.step(np.zeros(F))
        assert evicted.value.code is Code.FENCED
        with pytest.raises(StreamRefused, match="FENCED"):
            await one.resume("mic-7")


@pytest.mark.parametrize("if_exists", ["resume", "replace"])
async def test_a_client_that_opens_its_own_stream_again_keeps_one_of_the_two(if_exists: IfExists) -> None:
    async with running(SMALL, transport={"heartbeat_s": 0.2}) as server:
        async with Relay(server.endpoint) as relay, AsyncClient(relay.endpoint) as client:
            first = await client.open("mic-7")
            other = await client.open("mic-8")
            again = await client.open("mic-7", if_exists=if_exists)
            with pytest.raises(StreamEvicted) as evicted:
                await first.step(np.zeros(F))
            assert evicted.value.code is Code.FENCED
            relay.cut()
            for stream in (again, other):
                await stream.step(np.zeros(F))


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_a_client_that_leaves_while_an_open_was_cancelled_leaves_nothing_open(turns: int) -> None:
    async with running(SMALL) as server, AsyncClient(server.endpoint) as onlooker:
        async with AsyncClient(server.endpoint) as client:
            opening = asyncio.create_task(client.open_group([f"mic-{number}" for number in range(300)]))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        assert await onlooker.list_streams() == []


async def test_a_server_that_was_restarted_without_a_recording_is_told_from_an_eviction() -> None:
    async with running(SMALL) as server:
        endpoint = server.endpoint
        client = AsyncClient(endpoint)
        await client.connect()
        stream, group = await client.open("mic-7"), await client.open_group(["a", "b"])
        await stream.step(np.zeros(F))
        await group.step(np.zeros((2, F)))
    async with running(SMALL, transport={"endpoint": endpoint}):
        for step in (stream.step(np.zeros(F)), group.step(np.zeros((2, F)))):
            with pytest.raises(StreamEvicted) as lost:
                await step
            assert lost.value.code is Code.UNKNOWN_STREAM
            assert lost.value.sentence != Code.UNKNOWN_STREAM.sentence, "it says more than the server, of an eviction"
        again = await client.open("mic-7")
        assert again.next_seq == 0
        await client.close()


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_ENDPOINT", "tcp://127.0.0.1:1")
    assert repr(AsyncClient()) == "<AsyncClient tcp://127.0.0.1:1: not connected yet>"
    assert repr(Client()).startswith("<Client tcp://127.0.0.1:1: ")
    monkeypatch.delenv("INSTEP_ENDPOINT")
    assert "tcp://127.0.0.1:5757" in repr(AsyncClient())
