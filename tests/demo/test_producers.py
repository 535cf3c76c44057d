"""The producers: when each sends, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest

from instep.core.typing import F32
from instep.demo.producers import (
    BURST_FRAMES,
    FASTEST_S,
    SLOWEST_S,
    WINDOW_S,
    Heard,
    make_producers,
    right_after,
    stream_all,
)
from instep_client import StreamRefused
from tests.support.models import SMALL, whole
from tests.support.running import running

DEMO = [np.zeros((7 + index % 23, 5), np.float32) for index in range(370)]


def recordings(rng: np.random.Generator) -> list[F32]:
    return [rng.standard_normal((length, 5)).astype(np.float32) for length in (5, 9, 1, 12, 4, 7, 8)]


@pytest.mark.parametrize("connections", [7, 2])
async def test_everybody_hears_what_the_network_computes(connections: int, rng: np.random.Generator) -> None:
    everybody = make_producers(recordings(rng), speed=50.0)
    heard = Heard(everybody, outputs=8)
    async with running(SMALL) as server:
        seconds = await stream_all(server.endpoint, everybody, connections, heard)
    assert seconds >= max(producer.due_s[-1] for producer in everybody)
    for producer, outputs, latency_s in zip(everybody, heard.outputs, heard.latency_s, strict=True):
        assert outputs.tobytes() == whole(SMALL, producer.frames)[0].tobytes()
        assert (latency_s > 0).all()
        assert (latency_s + producer.due_s <= seconds).all()


async def test_a_refusal_ends_it(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INSTEP_KEY_FILE", "INSTEP_SERVER_KEY", "INSTEP_MODEL"):  # of another server
        monkeypatch.setenv(name, "none")
    everybody = make_producers(recordings(rng), speed=50.0)
    async with running(SMALL, engine={"max_streams": 3}) as server:
        with pytest.raises(StreamRefused):
            await stream_all(server.endpoint, everybody, 7, Heard(everybody, outputs=8))


def test_everybody_sends_every_frame_within_the_window_at_different_speeds() -> None:
    producers = make_producers(DEMO)
    assert [len(producer.due_s) for producer in producers] == [len(frames) for frames in DEMO]
    for producer in producers:
        assert producer.due_s[0] >= 0
        assert (np.diff(producer.due_s) >= 0).all()
    assert max(producer.due_s[-1] for producer in producers) <= max(WINDOW_S, 29 * SLOWEST_S)
    periods = [producer.due_s[1] - producer.due_s[0] for producer in producers if producer.chunk == 1]
    assert FASTEST_S - 1e-9 <= min(periods) < 0.01
    assert SLOWEST_S + 1e-9 >= max(periods) > 0.24


def test_a_fifth_sends_in_chunks_when_their_last_frame_is_there() -> None:
    bursty = [producer for producer in make_producers(DEMO) if producer.chunk != 1]
    assert len(bursty) == 74
    for producer in bursty:
        assert producer.chunk == BURST_FRAMES
        for due_s in np.split(producer.due_s, range(4, len(producer.due_s), 4)):
            assert (due_s == due_s[0]).all()


def test_they_are_the_same_each_time_and_scale_with_the_speed() -> None:
    for once, fast in zip(make_producers(DEMO), make_producers(DEMO, speed=4.0), strict=True):
        np.testing.assert_allclose(fast.due_s * 4, once.due_s)
        assert once.chunk == fast.chunk


def test_a_recording_that_is_over_counts_with_its_last_decision() -> None:
    longer, shorter = (np.eye(3, dtype=np.float32)[decisions] for decisions in ([0, 1, 1, 0], [0, 2]))
    right = right_after([longer, shorter], np.array([1, 2], np.int32))
    assert right.tolist() == [[False, True, True, False], [False, True, True, True]]
