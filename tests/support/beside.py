"""Serving with a process beside the server that reads what is recorded: frames, and waiting for what it finds."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from instep.core.typing import F32
from instep.server.background import LINE_BYTES, Background, Process

_MAIN: Final = "import importlib, sys; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"


async def start_program(code: str, words: Sequence[str]) -> Process:
    """Run a program with the name and arguments of the module that a server wants to run beside itself."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *words), stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=LINE_BYTES
    )


IN_FRESH_INTERPRETERS: Final = Background(partial(start_program, _MAIN))
"""As a server runs its processes, but a busy machine does not keep them from working."""


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
