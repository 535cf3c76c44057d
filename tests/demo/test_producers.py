from __future__ import annotations

import resource

import numpy as np
import pytest

from instep.demo.heard import Heard
from instep.demo.producers import Producer, connections_for, connections_within, stream_all
from instep.demo.timetable import timetable
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
