"""The load generator: what it sends is stepped, in order, and what comes back is looked at."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from instep.bench import connection as connection_module
from instep.bench.connection import Connection, Refused
from instep.bench.echo import Echo
from instep.bench.lanes import Feed, Lane, opened
from instep.bench.producer import closed_loop, open_loop, round_trips, waking_on_time
from instep.bench.reference import WrongOutput, check_and_close, truth
from instep.core.typing import F32, U64
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind
from tests.support.models import SMALL, torch_gru, whole
from tests.support.running import running

GRU = torch_gru(SMALL)
FEATURES, HIDDEN = 5, 8


def inputs(timesteps: int, streams: int) -> F32:
    return np.random.default_rng(3).standard_normal((timesteps, streams, FEATURES), np.float32)


def of_each(x: F32, steps: int = 1) -> list[Feed]:
    return [Feed.of(x[:, at : at + 1], steps) for at in range(x.shape[1])]


async def driven(drive: Callable[[Connection], None]) -> None:
    """Drive a connection to a real server from another thread."""

    def connected(endpoint: str) -> None:
        with Connection(endpoint) as connection:
            connection.hello()
            drive(connection)

    async with running(SMALL) as server:
        await asyncio.to_thread(connected, server.endpoint)
        assert server.engine.table.open_count == 0


async def test_blocks_in_closed_loop_are_right_to_the_last_bit() -> None:
    def drive(connection: Connection) -> None:
        x = inputs(7, 24)  # far fewer than are sent: they begin again
        lanes = opened(connection, [Feed.of(x[:, :12]), Feed.of(x[:, 12:])], "block")
        assert closed_loop(connection, lanes, 2, 0.1) > 0
        assert min(lane.answered for lane in lanes) > 7
        assert all(lane.sent == lane.answered for lane in lanes)
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_more_lanes_than_are_on_their_way_take_their_turns() -> None:
    def drive(connection: Connection) -> None:
        feeds = [Feed.of(inputs(9, 4)), Feed.of(inputs(9, 8)[:, 4:])]
        lanes = opened(connection, feeds, "many", lanes=10)
        assert [lane.first for lane in lanes] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        closed_loop(connection, lanes, 2, 0.1)
        closed_loop(connection, lanes, 2, 0.1)
        counts = [lane.answered for lane in lanes]
        assert min(counts) > 0
        assert max(counts) - min(counts) <= 4
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_the_next_round_goes_on_with_the_lane_whose_turn_it_is() -> None:
    def drive(connection: Connection) -> None:
        lanes = opened(connection, [Feed.of(inputs(9, 4))], "turn", lanes=10)
        for _ in range(5):
            closed_loop(connection, lanes, 2, 0.0)  # what is on its way at once, and no more
        assert [lane.answered for lane in lanes] == [1] * 10
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_single_frames_in_closed_loop() -> None:
    def drive(connection: Connection) -> None:
        lanes = opened(connection, of_each(inputs(7, 20)), "single")
        closed_loop(connection, lanes, 20, 0.1)
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_recordings_in_chunks_are_sent_once_and_whole() -> None:
    def drive(connection: Connection) -> None:
        x = inputs(12, 3)
        feeds = [Feed.of(x[:length, at : at + 1], 4) for at, length in enumerate((12, 4, 8))]
        lanes = opened(connection, feeds, "recording", once=True)
        closed_loop(connection, lanes, 3, math.inf)
        assert [lane.answered for lane in lanes] == [3, 1, 2]
        for lane in lanes:
            truly, _ = whole(SMALL, lane.feed.x[:, 0])
            np.testing.assert_array_equal(lane.outputs(HIDDEN)[:, 0], truly[-4:])
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_one_after_the_other_and_at_a_steady_rate() -> None:
    def drive(connection: Connection) -> None:
        [lane] = opened(connection, of_each(inputs(7, 1)), "one")
        times = round_trips(connection, lane, 0.1)
        assert len(times) == lane.answered > 0
        assert 0 < times.sum() < 0.2
        check_and_close(connection, [lane], GRU)
        lanes = opened(connection, of_each(inputs(7, 10)), "paced")
        latencies = open_loop(connection, lanes, rate_hz=100, seconds=0.1)
        assert len(latencies) == 100
        assert latencies.min() > 0
        assert [lane.answered for lane in lanes] == [10] * 10
        check_and_close(connection, lanes, GRU)

    await driven(drive)


async def test_latencies_count_from_when_a_frame_was_due() -> None:
    def drive(connection: Connection) -> None:
        lanes = opened(connection, of_each(inputs(7, 4)), "late")
        latencies = open_loop(connection, lanes, rate_hz=1e6, seconds=1e-5)  # all 40 are due at once
        assert len(latencies) == 40
        assert latencies[-4:].min() > latencies[:4].max()  # the last of each stream waited for the others
        check_and_close(connection, lanes, GRU)

    await driven(drive)


@pytest.mark.parametrize("what", ["weights", "inputs", "newest", "states"])
async def test_a_wrong_bit_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drive(connection: Connection) -> None:
        x = inputs(7, 16)
        lanes = opened(connection, [Feed.of(x[:, :8]), Feed.of(x[:, 8:])], "wrong")
        closed_loop(connection, lanes, 2, 0.02)
        gru = torch_gru(SMALL)
        if what == "weights":
            with torch.no_grad():
                next(gru.parameters())[0] += 1e-3
        elif what == "inputs":
            lanes[1].feed.x[0, 3, 0] += 1e-3
        elif what == "states":
            close = connection.close

            def with_another_bit(handles: U64) -> F32:
                states = close(handles).copy()
                states.view(np.int32)[3, 0, 0] ^= 1
                return states

            monkeypatch.setattr(connection, "close", with_another_bit)
        else:
            newest = lanes[1].outputs(HIDDEN).copy()
            newest.view(np.int32)[0, 3, 0] ^= 1
            lanes[1].last = newest.tobytes()
        wrong = 16 if what == "weights" else 1
        with pytest.raises(WrongOutput, match=f"^{wrong} of 16 streams differ from nn.GRU"):
            check_and_close(connection, lanes, gru)

    await driven(drive)


async def test_near_is_enough_where_no_bits_are_promised() -> None:
    def drive(connection: Connection) -> None:
        for difference, ok in ((1e-7, True), (1e-2, False)):
            lanes = opened(connection, [Feed.of(inputs(7, 8))], "near")
            closed_loop(connection, lanes, 1, 0.02)
            lanes[0].last = (lanes[0].outputs(HIDDEN) + np.float32(difference)).tobytes()
            if ok:
                check_and_close(connection, lanes, GRU, exactly=False)
            else:
                with pytest.raises(WrongOutput):
                    check_and_close(connection, lanes, GRU, exactly=False)

    await driven(drive)


async def test_a_frame_that_is_refused_ends_it_with_its_sentence() -> None:
    def drive(connection: Connection) -> None:
        x = inputs(3, 4)
        x[1, 2, 0] = np.nan
        lanes = opened(connection, [Feed.of(x)], "bad")
        with pytest.raises(Refused, match="a frame was refused: the frame or state holds NaN"):
            closed_loop(connection, lanes, 1, 0.5)
        connection.close(lanes[0].handles)

    await driven(drive)


async def test_a_message_that_is_refused_ends_it_with_its_sentence() -> None:
    def drive(connection: Connection) -> None:
        lanes = opened(connection, [Feed.of(np.zeros((2, 4, FEATURES + 1), np.float32))], "bad")
        with pytest.raises(Refused, match=r"the server answered ERROR: .*shape"):
            closed_loop(connection, lanes, 1, 0.5)
        with pytest.raises(Refused, match="already open"):
            connection.open(["bad-0-0"])
        connection.close(lanes[0].handles)

    await driven(drive)


@pytest.fixture
def router() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """What a server might be, by hand."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, f"tcp://127.0.0.1:{port}"
    context.destroy(linger=0)


def test_a_server_that_says_nothing(router: tuple[zmq.Socket[bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "SILENT_MS", 50)
    with Connection(router[1]) as connection, pytest.raises(Refused, match=r"nothing came for 0\.05 s"):
        connection.hello()


def test_a_ping_is_answered_and_a_goodbye_ends_it(router: tuple[zmq.Socket[bytes], str]) -> None:
    socket, endpoint = router
    with Connection(endpoint) as connection:
        connection.send(b"", b"", b"")
        routing_id = socket.recv_multipart()[0]
        socket.send_multipart([routing_id, wire.pack_header(Kind.PING, 77)])
        socket.send_multipart([routing_id, wire.pack_header(Kind.GOODBYE, 0, "it is late")])
        with pytest.raises(Refused, match="the server answered GOODBYE: it is late"):
            connection.receive()
        assert socket.recv_multipart() == [routing_id, wire.pack_header(Kind.PONG, 77)]


def test_the_echo_answers_every_message_with_one_of_a_servers_sizes() -> None:
    with Echo(HIDDEN * 4) as echo, Connection(echo.endpoint) as connection:
        feeds = of_each(inputs(7, 5))
        lanes = [Lane(at, np.array([at + 1], np.uint64), feed) for at, feed in enumerate(feeds)]
        assert closed_loop(connection, lanes, 5, 0.05) > 0
        assert all(lane.answered == lane.sent > 0 for lane in lanes)
        assert lanes[0].outputs(HIDDEN).shape == (1, 1, HIDDEN)
        socket = connection.socket
        lanes[0].send(connection)
        header, y, failures = socket.recv_multipart()
        assert wire.unpack_header([header, y, failures]).fields == (1, 1, 200, 100, 50, (), ())
        assert (len(y), failures) == (HIDDEN * 4, b"")


def test_the_truth_is_that_of_each_stream_after_its_own_count() -> None:
    x = inputs(5, 3)
    counts = np.array([3, 7, 2])  # the second begins again
    outputs, states = truth(GRU, x, counts, last=2, buckets=(4,))
    for at, count in enumerate(counts.tolist()):
        sent = np.concatenate([x, x])[:count, at]
        y, h = whole(SMALL, sent)
        np.testing.assert_array_equal(outputs[:, at], y[-2:])
        np.testing.assert_array_equal(states[at], h)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets sleeps last longer")
def test_sleeps_end_on_time_while_frames_are_due_and_as_ever_afterwards() -> None:
    def slack_ns() -> int:
        return int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text())

    before = slack_ns()
    with waking_on_time():
        assert slack_ns() == 1
    assert slack_ns() == before
