"""Serving with a process beside the server that reads what is recorded: frames, and waiting for what it finds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from instep.core.typing import F32


async def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for it.

    Raises:
        AssertionError: it does not hold in time.
    """
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        await asyncio.sleep(0.02)


def frames(rng: np.random.Generator, *shape: int) -> F32:
    """Random frames of five features."""
    return rng.standard_normal((*shape, 5)).astype(np.float32)
