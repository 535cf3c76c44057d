"""Serving with a process beside the server that checks what is recorded: frames, and waiting for what it finds."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from instep.core.typing import F32
from instep.server.live_verification import LINE_BYTES, Process, Supervision


async def start_program(code: str) -> Process:
    """Run a program instead of the one that checks."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=LINE_BYTES
    )


IN_A_FRESH_INTERPRETER: Final = Supervision(
    partial(start_program, "import instep.replay.live as live; live.main()"),
)
"""As a server runs it, but a busy machine does not keep it from working."""


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
