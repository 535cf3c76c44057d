"""What the loop does is counted, not timed: it is the same for every size of a block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from tests.support.models import SMALL
from tests.support.turning import Turning

F = 5
MOST_FOR_A_MESSAGE = 140
"""Lines and calls for one message of one frame in a burst, from the socket to the answer: 128, and some room."""

MOST_FOR_A_LONE_MESSAGE = 700
"""The same for one that comes by itself, so that nothing is shared: 680, and some room."""


def work(act: Callable[[], None]) -> int:
    """How many lines of Python and how many calls, those of C functions included, something takes."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        act()
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
    return count


def made(streams: int) -> tuple[Turning, Any]:
    turning = Turning(SMALL, engine={"max_streams": streams}, limits={"window_frames": 64})
    return turning, turning.opens(0, streams)


async def work_of_block(timesteps: int, columns: int) -> int:
    """What the loop does for a block, once it is warm; the steps are the worker's and left out."""
    turning, handles = made(columns)
    for turn in range(3):
        seqs = np.full(columns, turn * timesteps)
        turning.steps(0, handles, seqs, np.ones((timesteps, columns, F), np.float32), seqs)
        done = work(lambda: turning.turn(steps=False))
        assert len(turning.answers()) == 1
    return done


async def test_a_block_of_many_columns_is_as_much_work_as_one_of_few() -> None:
    assert await work_of_block(1, 16) == await work_of_block(1, 256)


async def test_a_lone_message_is_bounded_work() -> None:
    assert await work_of_block(1, 1) <= MOST_FOR_A_LONE_MESSAGE


async def test_a_block_of_many_timesteps_and_columns_is_as_much_work_as_one_of_few_columns() -> None:
    assert await work_of_block(8, 16) == await work_of_block(8, 64)


async def test_taking_a_message_of_many_timesteps_is_as_much_work_as_of_one() -> None:
    async def taking(timesteps: int) -> int:
        turning, handles = made(16)
        for turn in range(3):
            seqs = np.full(16, turn * timesteps)
            turning.steps(0, handles, seqs, np.ones((timesteps, 16, F), np.float32), seqs)
            done = work(turning.take)
            turning.turn()
        return done

    assert await taking(1) <= await taking(2) == await taking(8)


async def work_of_burst(messages: int) -> int:
    turning, handles = made(64)
    for turn in range(3):
        for handle in handles[:messages]:
            turning.steps(0, np.array([handle]), [turn], np.ones((1, 1, F), np.float32), [turn])
        done = work(lambda: turning.turn(steps=False))
        assert len(turning.answers()) == messages
    return done


async def test_a_message_more_in_a_burst_is_little_work() -> None:
    more = await work_of_burst(60) - await work_of_burst(20)
    assert more <= 40 * MOST_FOR_A_MESSAGE, f"{more / 40} a message"


async def test_a_frame_more_is_noticed() -> None:
    """The measure itself: a loop over frames is seen, even one that calls nothing."""

    def over(count: int) -> None:
        [None for _ in range(count)]

    assert work(lambda: over(50)) > work(lambda: over(49))
