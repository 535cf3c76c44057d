"""The load generator: everything it sends is stepped, in order, and every wrong bit is noticed."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from benchmarks.compiled_load import served_singly
from benchmarks.connection import BareConnection, NotServed
from benchmarks.echo import Echo
from benchmarks.load import (
    ClosedLoopStreams,
    Inputs,
    closed_loop,
    open_loop,
    open_streams,
    round_trips,
    waking_on_time,
)
from benchmarks.measurement import Bench
from benchmarks.reference import BenchmarkModel, WrongOutput, check_and_close, own_network, truth
from instep.core.typing import F32, U8, U64
from instep.models.folder import write_model
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind, unpack_stepped
from tests.support.models import SMALL, plain, whole
from tests.support.running import running
from tests.support.threaded import ThreadedServer

NETWORK = own_network(SMALL)
FEATURES, HIDDEN = 5, 8


def random_x(timesteps: int, streams: int) -> F32:
    return np.random.default_rng(3).standard_normal((timesteps, streams, FEATURES), np.float32)


def of_each(x: F32, steps: int = 1) -> list[Inputs]:
    return [Inputs.of(x[:, at : at + 1], steps) for at in range(x.shape[1])]


async def driven(drive: Callable[[BareConnection], None]) -> None:
    """Drive a connection to a real server from another thread."""

    def connected(endpoint: str) -> None:
        with BareConnection(endpoint) as connection:
            connection.hello()
            drive(connection)

    async with running(SMALL) as server:
        await asyncio.to_thread(connected, server.endpoint)


async def test_blocks_in_closed_loop_repeat_their_inputs() -> None:
    def drive(connection: BareConnection) -> None:
        x = random_x(7, 24)
        groups = open_streams(connection, [Inputs.of(x[:, :12]), Inputs.of(x[:, 12:])])
        while min(group.answered for group in groups) <= 7:  # however long the machine takes
            assert closed_loop(connection, groups, 2, 0.1) > 0
        assert all(group.sent == group.answered for group in groups)
        check_and_close(connection, groups, NETWORK)

    await driven(drive)


async def test_groups_take_turns_within_a_call_and_from_call_to_call() -> None:
    def drive(connection: BareConnection) -> None:
        inputs = [Inputs.of(random_x(9, 4)), Inputs.of(random_x(9, 8)[:, 4:])]
        groups = open_streams(connection, inputs, groups=10)
        assert [group.first for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        for _ in range(5):
            closed_loop(connection, groups, 2, 0.0)  # no more than two at once
        assert [group.answered for group in groups] == [1] * 10
        closed_loop(connection, groups, 2, 0.1)
        counts = [group.answered for group in groups]
        assert max(counts) - min(counts) <= 4
        check_and_close(connection, groups, NETWORK)

    await driven(drive)


@pytest.mark.parametrize(("connections", "streams"), [(2, 12), (6, 1)])
def test_a_compiled_load_keeps_a_frame_of_each_stream_in_flight(connections: int, streams: int, tmp_path: Path) -> None:
    write_model(tmp_path / "small", SMALL)
    model = BenchmarkModel.of(Bench(tmp_path, model=tmp_path / "small"), "small")
    x = random_x(7, connections * streams)
    with ThreadedServer(tmp_path / "small") as server:
        served = served_singly(server, model, x, connections, 0.1)  # checks every stream's states and newest outputs
        assert served.rate > connections * streams
        assert served.cpu_us > 0
        model = replace(model, truth=own_network(plain(FEATURES, HIDDEN, seed=9)))
        with pytest.raises(WrongOutput):
            served_singly(server, model, x, connections, 0.1)


async def test_recordings_in_chunks_are_sent_once_and_whole() -> None:
    def drive(connection: BareConnection) -> None:
        x = random_x(12, 3)
        inputs = [Inputs.of(x[:length, at : at + 1], 4) for at, length in enumerate((12, 4, 8))]
        groups = open_streams(connection, inputs, once=True)
        closed_loop(connection, groups, 3, math.inf)
        assert [group.answered for group in groups] == [3, 1, 2]
        for group in groups:
            expected, _ = whole(SMALL, group.inputs.x[:, 0])
            np.testing.assert_array_equal(group.outputs(HIDDEN)[:, 0], expected[-4:])
        check_and_close(connection, groups, NETWORK)

    await driven(drive)


async def test_round_trips_and_open_loop_of_single_frames() -> None:
    def drive(connection: BareConnection) -> None:
        [stream] = open_streams(connection, of_each(random_x(7, 1)))
        times = round_trips(connection, stream, 0.1)
        assert len(times) == stream.answered > 0
        check_and_close(connection, [stream], NETWORK)
        streams = open_streams(connection, of_each(random_x(7, 10)))
        latencies = open_loop(connection, streams, rate_hz=100, seconds=0.1)
        assert len(latencies) == 100
        assert latencies.min() > 0
        assert [each.answered for each in streams] == [10] * 10
        check_and_close(connection, streams, NETWORK)

    await driven(drive)


async def test_latencies_count_from_when_a_frame_was_due() -> None:
    def drive(connection: BareConnection) -> None:
        streams = open_streams(connection, of_each(random_x(7, 4)))
        latencies = open_loop(connection, streams, rate_hz=1e6, seconds=1e-5)  # all 40 are due at once
        assert len(latencies) == 40
        assert latencies[-4:].min() > latencies[:4].max()  # the last of each stream waited for the others
        check_and_close(connection, streams, NETWORK)

    await driven(drive)


@pytest.mark.parametrize("where", ["weights", "inputs", "newest output", "final state"])
async def test_a_wrong_bit_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drive(connection: BareConnection) -> None:
        x = random_x(7, 16)
        groups = open_streams(connection, [Inputs.of(x[:, :8]), Inputs.of(x[:, 8:])])
        closed_loop(connection, groups, 2, 0.02)
        model = SMALL
        if where == "weights":
            name, first = next(iter(SMALL.weights.items()))
            model = replace(SMALL, weights={**SMALL.weights, name: first + 1e-3})
        elif where == "inputs":
            groups[1].inputs.x[0, 3, 0] += 1e-3
        elif where == "final state":
            close = connection.close

            def with_another_bit(handles: U64) -> U8:
                states = close(handles).copy()
                states[3, 0] ^= 1
                return states

            monkeypatch.setattr(connection, "close", with_another_bit)
        else:
            newest = groups[1].outputs(HIDDEN).copy()
            newest.view(np.int32)[0, 3, 0] ^= 1
            groups[1].last = newest.tobytes()
        wrong = 16 if where == "weights" else 1
        with pytest.raises(WrongOutput, match=f"^{wrong} of 16 streams differ from the model"):
            check_and_close(connection, groups, own_network(model))

    await driven(drive)


async def test_a_refusal_ends_the_measurement_with_its_sentence() -> None:
    def drive(connection: BareConnection) -> None:
        x = random_x(3, 4)
        x[1, 2, 0] = np.nan
        groups = open_streams(connection, [Inputs.of(x)])
        with pytest.raises(NotServed):
            closed_loop(connection, groups, 1, 0.5)
        with pytest.raises(NotServed):
            connection.open(["group-0-0"])
        connection.close(groups[0].handles)
        groups = open_streams(connection, [Inputs.of(np.zeros((2, 4, FEATURES + 1), np.float32))])
        with pytest.raises(NotServed):
            closed_loop(connection, groups, 1, 0.5)

    await driven(drive)


@pytest.fixture
def router() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A server by hand."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, f"tcp://127.0.0.1:{port}"
    context.destroy(linger=0)


def test_a_silent_server_ends_the_measurement(router: tuple[zmq.Socket[bytes], str]) -> None:
    with BareConnection(router[1]) as connection:
        connection.socket.rcvtimeo = 50
        with pytest.raises(NotServed):
            connection.hello()


def test_a_ping_is_answered_and_a_goodbye_ends_the_measurement(router: tuple[zmq.Socket[bytes], str]) -> None:
    socket, endpoint = router
    with BareConnection(endpoint) as connection:
        connection.send(b"", b"")
        routing_id = socket.recv_multipart()[0]
        socket.send_multipart([routing_id, wire.pack_header(Kind.PING, 77)])
        socket.send_multipart([routing_id, wire.pack_header(Kind.GOODBYE, 0, "it is late")])
        with pytest.raises(NotServed):
            connection.receive()
        assert socket.recv_multipart() == [routing_id, wire.pack_header(Kind.PONG, 77)]


def test_the_echo_answers_every_message_with_one_of_a_servers_sizes() -> None:
    with Echo(HIDDEN * 4) as echo, BareConnection(echo.endpoint) as connection:
        inputs = of_each(random_x(7, 5))
        streams = [ClosedLoopStreams(at, np.array([at + 1], np.uint64), own) for at, own in enumerate(inputs)]
        assert closed_loop(connection, streams, 5, 0.05) > 0
        assert all(stream.answered == stream.sent > 0 for stream in streams)
        streams[0].send(connection)
        reply = unpack_stepped(connection.socket.recv_multipart())
        assert (reply.answered, reply.y.shape, len(reply.failures)) == ([(1, 1)], (1, 1, HIDDEN), 0)


def test_the_truth_is_that_of_each_stream_after_its_own_count() -> None:
    x = random_x(5, 3)
    counts = np.array([3, 7, 2])  # the second repeats its inputs
    outputs, states = truth(NETWORK, x, counts, last=2)
    for at, count in enumerate(counts.tolist()):
        y, h = whole(SMALL, np.concatenate([x, x])[:count, at])
        np.testing.assert_array_equal(outputs[:, at], y[-2:])
        np.testing.assert_array_equal(states[at].view(np.float32).reshape(h.shape), h)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets sleeps last longer")
def test_sleeps_end_on_time_while_frames_are_due() -> None:
    def slack_ns() -> int:
        return int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text())

    before = slack_ns()
    with waking_on_time():
        assert slack_ns() == 1
    assert slack_ns() == before
