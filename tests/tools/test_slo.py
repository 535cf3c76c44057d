from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep_tools.slo import FAILURES_TO_BELIEVE, RESOLUTION, largest_within


class ServerThatHolds:
    """Meets the level up to `capacity` streams; keeps what it was asked."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.asked: list[int] = []

    async def measure(self, streams: int) -> bool:
        self.asked.append(streams)
        return streams <= self.capacity


@given(st.integers(0, 5000), st.integers(1, 4096), st.integers(1, 4096))
async def test_the_answer_is_right_to_the_resolution(capacity: int, start: int, limit: int) -> None:
    server = ServerThatHolds(capacity)
    found = await largest_within(server.measure, min(start, limit), limit)
    truth = min(capacity, limit)
    assert found.streams <= truth
    assert truth - found.streams <= max(0, found.streams * RESOLUTION)
    assert found.limited == (capacity >= limit)
    assert all(1 <= streams <= limit for streams in server.asked)
    assert len(server.asked) <= FAILURES_TO_BELIEVE * 25


async def test_it_doubles_then_bisects() -> None:
    server = ServerThatHolds(100)
    assert (await largest_within(server.measure, 16, 4096)).streams == 100
    assert server.asked == [16, 32, 64, 128, 128, 96, 112, 112, 104, 104, 100, 102, 102]


async def test_it_halves_while_the_start_was_too_much() -> None:
    server = ServerThatHolds(5)
    assert (await largest_within(server.measure, 64, 4096)).streams == 5
    assert server.asked == [64, 64, 32, 32, 16, 16, 8, 8, 4, 6, 6, 5]


async def test_nothing_is_possible() -> None:
    server = ServerThatHolds(0)
    found = await largest_within(server.measure, 4, 64)
    assert (found.streams, found.limited) == (0, False)
    assert server.asked == [4, 4, 2, 2, 1, 1]


async def test_one_hiccup_decides_nothing() -> None:
    asked: list[int] = []

    async def hiccups_at_first(streams: int) -> bool:
        asked.append(streams)
        return streams <= 512 and asked.count(streams) > 1

    assert (await largest_within(hiccups_at_first, 64, 512)).streams == 512
    assert asked == [64, 64, 128, 128, 256, 256, 512, 512]


async def test_failures_of_the_measurement_come_out() -> None:
    async def broken(streams: int) -> bool:
        raise OSError("no server")

    with pytest.raises(OSError, match="no server"):
        await largest_within(broken, 1, 2)
