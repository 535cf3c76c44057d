from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.errors import ConnectionFailed, Refused
from instep_client.protocol.wire import F32
from instep_tools.pipeline import pipeline, task_group


def f32(value: float) -> F32:
    return np.array([value], np.float32)


async def test_answers_are_taken_in_the_order_of_sending() -> None:
    taken: list[tuple[str, float]] = []
    first = asyncio.Event()

    def take(key: str, result: F32 | Refused) -> None:
        assert not isinstance(result, Refused)
        taken.append((key, float(result[0])))

    async def slow() -> F32:
        await first.wait()
        return f32(1)

    async def fast() -> F32:
        first.set()
        return f32(2)

    async with pipeline(take) as send:
        await send("slow", slow)
        await send("fast", fast)
    assert taken == [("slow", 1), ("fast", 2)]


async def test_calls_start_in_order_and_only_so_many_are_on_their_way() -> None:
    started: list[int] = []
    going_on = asyncio.Event()

    async def call(number: int) -> F32:
        started.append(number)
        await going_on.wait()
        return f32(number)

    async def send_all() -> None:
        async with pipeline(lambda key, result: None, depth=3) as send:
            for number in range(20):
                await send(number, partial(call, number))

    sending = asyncio.create_task(send_all())
    for _ in range(50):
        await asyncio.sleep(0)
    assert started == [0, 1, 2, 3, 4]  # three wait in line, one is being taken, one waits for its place
    going_on.set()
    await sending
    assert started == list(range(20))


async def test_refusals_are_answers_too() -> None:
    taken: list[F32 | Refused] = []
    refused = Refused(Code.BUSY, SENTENCES[Code.BUSY])

    async def refuse() -> F32:
        raise refused

    async def answer() -> F32:
        return f32(1)

    async with pipeline(lambda key, result: taken.append(result)) as send:
        await send(0, refuse)
        await send(1, answer)
    assert taken[0] is refused
    assert taken[1] == f32(1)


async def test_a_lost_connection_ends_the_sending() -> None:
    async def fail() -> F32:
        raise ConnectionFailed("gone")

    async def never() -> F32:
        await asyncio.Event().wait()
        raise AssertionError

    async def send_all() -> None:
        async with pipeline(lambda key, result: None, depth=1) as send:
            await send(0, never)
            await send(1, fail)
            for number in range(10):
                await send(number, never)

    with pytest.raises(ConnectionFailed, match="gone"):
        await send_all()


async def test_a_failure_of_the_sender_comes_out_alone() -> None:
    async def fail() -> None:
        async with task_group() as tasks:
            tasks.create_task(asyncio.Event().wait())
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        await fail()
