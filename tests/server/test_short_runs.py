"""Which runs are short enough for the loop to do them itself. (What comes of them: `test_step_process.py`.)"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.models import SMALL
from tests.support.turning import Turning

F = 5


def is_short(step_ns: dict[int, int], timesteps: int = 1, streams: int = 1) -> bool:
    """Whether the run is that begins with a block of so many frames, where a step of each bucket has taken so long."""
    turning = Turning(SMALL)
    engine = turning.server.engine
    engine.longest_run_ns = 10**9
    engine._step_ns = step_ns
    handles = turning.opens(0, streams)
    turning.steps(0, handles, [0] * streams, np.ones((timesteps, streams, F), np.float32), [0] * streams)
    turning.take()
    engine.schedule()
    (job,) = turning.jobs
    assert job.step is not None
    assert job.step[1].shape == (timesteps, streams)
    return job.is_short


def smallest() -> int:
    return Turning(SMALL).server.engine._stepper.buckets[0]


async def test_a_run_that_is_expected_to_take_less_than_300_us_is_short() -> None:
    assert is_short({smallest(): 299_999})
    assert not is_short({smallest(): 300_000})


async def test_nobody_knows_how_long_the_first_one_takes() -> None:
    assert not is_short({})


@pytest.mark.parametrize(("timesteps", "expected"), [(2, True), (3, False), (8, False)])
async def test_all_steps_of_a_run_count(timesteps: int, expected: bool) -> None:
    assert is_short({smallest(): 100_000}, timesteps) == expected


async def test_only_the_smallest_bucket_is_short() -> None:
    small, larger = Turning(SMALL).server.engine._stepper.buckets[:2]
    assert is_short({small: 1, larger: 1}, streams=small)
    assert not is_short({small: 1, larger: 1}, streams=small + 1)
