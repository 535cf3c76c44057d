"""The producers: when each sends, what comes back, and how many connections they share."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from instep.core.typing import F32
from instep.demo.producers import (
    BURST_FRAMES,
    FASTEST_S,
    SLOWEST_S,
    WINDOW_S,
    Heard,
    Producer,
    connections_for,
    connections_within,
    probabilities,
    right_after,
    stream_all,
    timetable,
)
from instep_client import StreamRefused
from tests.support.models import SMALL, whole
from tests.support.running import running

LENGTHS = [5, 9, 1, 12, 4, 7, 8]
UNLIMITED = resource.RLIM_INFINITY


def make_producers(rng: np.random.Generator, speed: float) -> list[Producer]:
    return [
        Producer(f"stream-{row}", rng.standard_normal((len(part.due_s), 5)).astype(np.float32), part)
        for row, part in enumerate(timetable(LENGTHS, speed))
    ]


@pytest.mark.parametrize("connections", [7, 2])
async def test_everybody_hears_what_the_network_computes(connections: int, rng: np.random.Generator) -> None:
    everybody = make_producers(rng, speed=50.0)
    heard = Heard(LENGTHS, outputs=8)
    async with running(SMALL) as server:
        seconds = await stream_all(server.endpoint, everybody, connections, heard)
    assert seconds >= max(producer.part.due_s[-1] for producer in everybody)
    for producer, outputs, latency_s in zip(everybody, heard.outputs, heard.latency_s, strict=True):
        assert outputs.tobytes() == whole(SMALL, producer.frames)[0].tobytes()
        assert (latency_s > 0).all()
        assert (latency_s + producer.part.due_s <= seconds).all()


async def test_a_refusal_ends_it(rng: np.random.Generator) -> None:
    async with running(SMALL, engine={"max_streams": 3}) as server:
        with pytest.raises(StreamRefused):
            await stream_all(server.endpoint, make_producers(rng, speed=50.0), 7, Heard(LENGTHS, outputs=8))


@pytest.mark.parametrize(("descriptors", "connections"), [(20_000, 370), (890, 370), (888, 369), (256, 53), (64, 1)])
def test_connections_within_the_limit_of_open_files(descriptors: int, connections: int) -> None:
    assert connections_within(descriptors, 370) == connections


@pytest.mark.parametrize(
    ("limits", "raised", "connections"),
    [
        ((20_000, 20_000), None, 370),
        ((256, 20_000), (890, 20_000), 370),
        ((256, UNLIMITED), (890, UNLIMITED), 370),
        ((256, 400), (400, 400), 125),
        ((256, 256), None, 53),
        ((UNLIMITED, UNLIMITED), None, 370),
    ],
)
def test_the_limit_is_raised_as_far_as_needed_and_allowed(
    limits: tuple[int, int], raised: tuple[int, int] | None, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: set_to.append(to))
    assert connections_for(370) == connections
    assert set_to == ([] if raised is None else [raised])


DEMO_LENGTHS = [7 + index % 23 for index in range(370)]


def test_everybody_sends_every_frame_within_the_window() -> None:
    parts = timetable(DEMO_LENGTHS)
    assert [len(part.due_s) for part in parts] == DEMO_LENGTHS
    for part in parts:
        assert part.due_s[0] >= 0
        assert (np.diff(part.due_s) >= 0).all()
    assert max(part.due_s[-1] for part in parts) <= max(WINDOW_S, max(DEMO_LENGTHS) * SLOWEST_S)


def test_speeds_differ_and_starts_are_staggered() -> None:
    steady = [part.due_s for part in timetable(DEMO_LENGTHS) if part.chunk == 1]
    periods = np.array([due_s[1] - due_s[0] for due_s in steady])
    for due_s, period in zip(steady, periods, strict=True):
        np.testing.assert_allclose(np.diff(due_s), period)
    assert FASTEST_S - 1e-9 <= periods.min() < 0.01
    assert SLOWEST_S + 1e-9 >= periods.max() > 0.24
    assert len({due_s[0] for due_s in steady}) == len(steady)


def test_a_fifth_sends_in_chunks_when_their_last_frame_is_there() -> None:
    bursty = [part for part in timetable(DEMO_LENGTHS) if part.chunk != 1]
    assert len(bursty) == 74
    for part in bursty:
        assert part.chunk == BURST_FRAMES
        firsts = part.due_s[::BURST_FRAMES]
        for first, due_s in zip(firsts, np.split(part.due_s, range(4, len(part.due_s), 4)), strict=True):
            assert (due_s == first).all()
        whole = np.diff(firsts)[: len(part.due_s) // BURST_FRAMES - 1]
        np.testing.assert_allclose(whole, whole[:1].repeat(len(whole)))


def test_it_is_the_same_each_time_and_scales_with_the_speed() -> None:
    for once, again, fast in zip(
        timetable(DEMO_LENGTHS), timetable(DEMO_LENGTHS), timetable(DEMO_LENGTHS, speed=4.0), strict=True
    ):
        assert once.due_s.tolist() == again.due_s.tolist()
        np.testing.assert_allclose(fast.due_s * 4, once.due_s)
        assert once.chunk == fast.chunk


SPEAKERS = np.array([1, 2], np.int32)


def deciding(*decisions: int) -> F32:
    """Outputs of three speakers that decide so."""
    return np.eye(3, dtype=np.float32)[list(decisions)]


def test_what_came_back_is_kept_in_its_place() -> None:
    heard = Heard([3, 2], outputs=3)
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (0, 0, 0.0)
    heard.add(1, deciding(2), np.array([0.5]))
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (1, 0, 1.0)
    heard.add(1, deciding(0), np.array([0.25]))
    heard.add(0, deciding(0, 1), np.array([1.0, 2.0]))
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (4, 1, 0.5)
    assert heard.outputs[1].tolist() == deciding(2, 0).tolist()
    assert heard.outputs[0][:2].tolist() == deciding(0, 1).tolist()
    assert np.isnan(heard.outputs[0][2]).all()
    assert heard.latency_s[1].tolist() == [0.5, 0.25]
    assert heard.answered.tolist() == [2, 2]


def test_a_recording_that_is_over_counts_with_its_last_decision() -> None:
    right = right_after([deciding(0, 1, 1, 0), deciding(0, 2)], SPEAKERS)
    assert right.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    outputs = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], np.float32)
    assert probabilities(outputs) == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))
