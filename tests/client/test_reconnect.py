"""Both clients over real sockets, to a server that forgets connections and keeps streams; and every verb on states."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from instep_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DataLoss,
    InvalidInput,
    StreamEvicted,
    StreamSnapshot,
)
from tests.support.fake_server import F32, RING_INFO, FakeServer, reference

X: F32 = np.random.default_rng(3).standard_normal((400, 3)).astype(np.float32)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(RING_INFO) as running:
        yield running


async def test_steps_go_on_over_restarts(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        outputs = []
        with caplog.at_level(logging.WARNING, "instep_client"):
            for index, x in enumerate(X[:40]):
                if index % 10 == 5:
                    server.do(server.rules.restart)
                outputs.append(await stream.step(x))
        assert np.array_equal(np.array(outputs), reference(X[:40])[0])
        assert len(server.rules.streams["a"].applied) == 40
        assert len(caplog.records) == 4 * 2, "one says why, the next one that the client is back"
        assert all(server.endpoint in each.getMessage() for each in caplog.records)
        assert client.info.boot_id == "boot 4"


async def test_pipelined_sends_go_on_over_restarts(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")

        async def send() -> None:
            for index, x in enumerate(X):
                if index % 100 == 50:
                    server.do(server.rules.restart)
                await stream.send(x)
            stream.finish()

        sending = asyncio.create_task(send())
        outputs = [y async for y in stream]
        await sending
        assert np.array_equal(np.array(outputs), reference(X)[0])
        final = await stream.close()
        assert np.array_equal(final["h"], reference(X)[1])


def test_threads_go_on_over_restarts(server: FakeServer) -> None:
    with Client(server.endpoint) as client:
        group = client.open_group(["a", "b"])
        epochs = group.epochs.tolist()
        first = group.step(X[:20].reshape(10, 2, 3))
        server.do(server.rules.restart)
        second = group.step(X[20:40].reshape(10, 2, 3))
        outputs = np.concatenate([first, second])
        for column in range(2):
            assert np.array_equal(outputs[:, column], reference(X[column:40:2])[0])
        assert (group.epochs > epochs).all()


async def test_a_server_that_never_comes_back_is_given_up(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint, timeout_s=1.0, reconnect_s=0.3) as client:
        stream = await client.open("a")
        with server.paused(), pytest.raises(ConnectionFailed):
            await stream.step(X[0])


async def test_without_room_for_another_socket_the_connection_has_failed(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        raise zmq.ZMQError(errno.EMFILE)

    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        server.do(server.rules.restart)
        monkeypatch.setattr(zmq.Context, "socket", none_left)
        with pytest.raises(ConnectionFailed):
            await stream.step(X[0])
        monkeypatch.undo()


async def test_a_stream_moves_from_client_to_client(server: FakeServer) -> None:
    async with AsyncClient(server.endpoint) as one, AsyncClient(server.endpoint) as two:
        stream = await one.open("a")
        await stream.step(X[:5])
        taken = await two.resume("a", have=3, take_over=True)
        assert (taken.next_seq, taken.name) == (3, "a")
        assert np.array_equal(await taken.step(X[3:8]), reference(X[:8])[0][3:])
        with pytest.raises(StreamEvicted):
            await stream.step(X[5])
        epoch = taken.epoch
        with pytest.raises(DataLoss) as caught:
            await one.resume("a", have=20, epoch=epoch)
        assert (caught.value.have, caught.value.server_has) == (20, 8)
        back = await one.resume_group(["a"], have=[8], epochs=[epoch])
        assert back.next_seqs.tolist() == [8]


async def test_states_are_looked_at_reset_copied_saved_and_restored(server: FakeServer, tmp_path: Path) -> None:
    async with AsyncClient(server.endpoint) as client:
        stream = await client.open("a")
        await stream.step(X[:5])
        seq, state = await stream.read_state()
        assert seq == 5
        assert np.array_equal(state["h"], reference(X[:5])[1])
        (await stream.snapshot()).save(tmp_path / "a.safetensors")
        copy = await stream.fork("b")
        await stream.reset()
        assert np.array_equal(await stream.step(X[5]), reference(X[5:6])[0][0])
        await stream.reset(state)
        restored = await client.restore(StreamSnapshot.load(tmp_path / "a.safetensors"), "c")
        assert (copy.next_seq, restored.next_seq) == (5, 5)
        for other in (stream, copy, restored):
            assert np.array_equal(await other.step(X[5]), reference(X[:6])[0][5])
        foreign = StreamSnapshot("d", 0, state, "another", "model")
        with pytest.raises(InvalidInput):
            await client.restore(foreign)
        assert (await client.open("e", first_seq=9)).next_seq == 9
