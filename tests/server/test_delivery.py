"""Frames that are sent again, ahead of their turn or beyond the window: every frame is computed once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from instep.core.typing import F32
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H, W = 5, 8, 8


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(SMALL, limits={"window_frames": W}) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[RawClient]:
    async with RawClient(server.endpoint) as client:
        await client.hello()
        yield client


def frames(rng: np.random.Generator, timesteps: int, columns: int = 1) -> F32:
    return rng.standard_normal((timesteps, columns, F)).astype(np.float32)


async def test_frames_sent_again_are_answered_with_the_same_bytes_and_not_computed_again(
    server: Server, client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("a", "b")).handles()
    x = frames(rng, W, 2)
    first = await client.step(handles, [0, 0], x)
    for _ in range(3):
        again = await client.step(handles, [0, 0], x)
        assert again.failures() == []
        assert again.frames == first.frames
    part = await client.step(handles[1:], [3], x[3:6, 1:])
    assert part.frames[0] == first.floats().reshape(W, 2, H)[3:6, 1].tobytes()
    assert server.statistics.frames_total == 2 * W
    assert server.engine.rings.pending_count == 0
    read = await client.read_state(handles)
    for column in range(2):
        np.testing.assert_array_equal(read.floats().reshape(2, H)[column], whole(SMALL, x[:, column])[1][0])


async def test_a_block_may_mix_what_was_applied_and_what_is_new_within_and_across_columns(
    server: Server, client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("ahead", "behind", "new")).handles()
    x = frames(rng, 6, 3)
    await client.step(handles[:1], [0], x[:, :1])
    await client.step(handles[1:2], [0], x[:2, 1:2])
    reply = await client.step(handles, [0, 0, 0], x)
    assert reply.failures() == []
    for column in range(3):
        truth = whole(SMALL, x[:, column])[0]
        np.testing.assert_array_equal(reply.floats().reshape(6, 3, H)[:, column], truth)
    assert server.statistics.frames_total == 3 * 6


async def test_the_same_seq_with_another_bit_is_a_conflict_and_changes_nothing(
    server: Server, client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 6)
    await client.step(handles, [0], x[:4])
    other = x.copy()
    other[2].view(np.uint32)[0, F - 1] ^= 1
    reply = await client.step(handles, [0], other)
    assert reply.failures() == [(0, 2, Code.CONFLICT, 4)]
    truth = whole(SMALL, x[:, 0])[0]
    served = reply.floats().reshape(6, H)
    np.testing.assert_array_equal(served[:2], truth[:2])
    assert np.isnan(served[2:]).all()
    rest = await client.step(handles, [4], x[4:])
    np.testing.assert_array_equal(rest.floats().reshape(2, H), truth[4:])
    assert server.statistics.frames_total == 6


async def test_a_gap_is_refused_with_the_seq_that_is_expected(client: RawClient, rng: np.random.Generator) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 3)
    assert (await client.step(handles, [1], x[1:])).failures() == [(0, 0, Code.SEQ_GAP, 0)]
    reply = await client.step(handles, [0], x)
    np.testing.assert_array_equal(reply.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])


async def test_the_window_admits_what_fits_and_moves_with_what_is_acknowledged(
    client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 3 * W)
    truth = whole(SMALL, x[:, 0])[0]
    reply = await client.step(handles, [0], x[: W + 2])
    assert reply.failures() == [(0, W, Code.WINDOW_FULL, W)]
    np.testing.assert_array_equal(reply.floats().reshape(W + 2, H)[:W], truth[:W])
    full = await client.step(handles, [W], x[W : W + 1])
    assert full.failures() == [(0, 0, Code.WINDOW_FULL, W)]
    moved = await client.step(handles, [W], x[W : 2 * W], acked=[W - 3])
    assert moved.failures() == [(0, W - 3, Code.WINDOW_FULL, 2 * W - 3)]
    again = await client.step(handles, [W - 3], x[W - 3 : 2 * W - 3], acked=[W - 3])
    np.testing.assert_array_equal(again.floats().reshape(W, H), truth[W - 3 : 2 * W - 3])


async def test_what_was_not_computed_cannot_be_acknowledged(client: RawClient, rng: np.random.Generator) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 2)
    await client.step(handles, [0], x[:1])
    assert (await client.step(handles, [1], x[1:], acked=[2])).failures() == [(0, 0, Code.ACK_AHEAD, 1)]
    assert (await client.step(handles, [1], x[1:], acked=[1])).failures() == []


async def test_an_acknowledged_frame_is_kept_no_longer(client: RawClient, rng: np.random.Generator) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 3)
    await client.step(handles, [0], x[:2])
    await client.step(handles, [2], x[2:], acked=[1])
    assert (await client.step(handles, [0], x[:1])).failures() == [(0, 0, Code.SEQ_REPEATED, 3)]
    assert (await client.step(handles, [1], x[1:2], acked=[1])).failures() == []


async def test_many_windows_later_every_output_is_still_the_networks(
    client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("a")).handles()
    x = frames(rng, 20 * W)
    served, seq, acked = np.full((20 * W, H), np.nan, np.float32), 0, 0
    while seq < len(x):
        start = int(rng.integers(acked, seq + 1))  # some of them again
        stop = min(len(x), start + int(rng.integers(1, W + 1)), acked + W)
        if stop <= start:
            acked = start
            continue
        reply = await client.step(handles, [start], x[start:stop], acked=[acked])
        assert (reply.kind, reply.failures()) == (Kind.STEPPED, [])
        served[start:stop] = reply.floats().reshape(-1, H)
        seq = max(seq, stop)
        acked = int(rng.integers(acked, seq + 1))
    np.testing.assert_array_equal(served, whole(SMALL, x[:, 0])[0])
