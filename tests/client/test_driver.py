"""What only a real socket shows: a full one, a lost edge, many at once, and a bug that must not hang callers."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from dataclasses import replace

import numpy as np
import pytest
import zmq

from instep_client import AsyncClient, ConnectionFailed
from instep_client.driver import OPTIONS, Driver, shared
from instep_client.session import Session
from tests.support.fake_server import INFO, FakeServer, reference

X = np.arange(300, dtype=np.float32).reshape(100, 3)


async def test_a_full_socket_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, zmq.SNDHWM, 1)
    info = replace(INFO, features=2500, credit_frames=100_000, max_block_frames=100)
    x = np.ones((100, 2500), np.float32)
    with FakeServer(info) as server:
        async with AsyncClient(server.endpoint) as client:
            streams = [await client.open(f"s{i}") for i in range(40)]
            with server.paused():
                steps = [asyncio.create_task(stream.step(x)) for stream in streams]  # 40 MB, more than the kernel takes
                await asyncio.sleep(0.01)
            outputs = await asyncio.gather(*steps)
    expected, _ = reference(x, info=info)
    assert all(y.tolist() == expected.tolist() for y in outputs)


async def test_no_answer_is_left_lying_in_the_socket() -> None:
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            for _ in range(3):
                with server.paused():
                    pings = [asyncio.create_task(client.ping()) for _ in range(700)]
                    await asyncio.sleep(0.01)
                time.sleep(0.05)  # noqa: ASYNC251 (more answers come than are taken from a socket in one turn)
                await asyncio.wait_for(asyncio.gather(*pings), 5)


async def test_a_thousand_and_more_clients_share_one_context() -> None:
    with FakeServer() as server:
        clients = [AsyncClient(server.endpoint) for _ in range(1100)]
        await asyncio.gather(*[client.connect() for client in clients])
        assert len(shared) == 1
        await asyncio.gather(*[client.ping() for client in clients])
        await asyncio.gather(*[client.close() for client in clients])
        assert len(shared) == 0
    gc.collect()


async def test_a_bug_in_the_rules_fails_the_calls_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("a")

            def bug(session: Session, now: float) -> None:
                raise RuntimeError("bug")

            monkeypatch.setattr(Session, "advance", bug)
            with (
                caplog.at_level(logging.ERROR, "instep_client"),
                pytest.raises(ConnectionFailed),
            ):
                await stream.step(X[0])
            assert "the client failed" in caplog.text
            monkeypatch.undo()


async def test_closing_does_not_wait_long_for_a_server_that_hangs() -> None:
    with FakeServer() as server:
        session = Session(server.endpoint)
        driver = Driver(session, farewell_s=0.05)
        await driver.start(wait=False)
        await driver.wait(session.open(["a"], None, single=True))
        server.rules.fault = lambda header, frames: []
        async with asyncio.timeout(0.9):
            await driver.stop()
    gc.collect()


async def test_a_loop_that_is_held_up_is_told_in_the_numbers_and_once_in_the_log(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        for _ in range(2):
            step = asyncio.ensure_future(stream.step(X[0]))
            await asyncio.sleep(0)
            time.sleep(0.6)  # noqa: ASYNC251 (what users do)
            await step
        assert (await client.stats())["loop_lag_s"] >= 0.6
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def test_a_closed_client_may_still_be_told_to_do_nothing() -> None:
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("a")
        stream.finish()
        await asyncio.sleep(0)
        assert [y async for y in stream] == []
