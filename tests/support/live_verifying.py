"""A server that has what it records checked: its model, and what was found."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.server.server import Server
from instep.streaming.verification import Verification
from instep_client import AsyncClient, AsyncStream
from tests.support.beside import frames, until
from tests.support.models import plain

EARS = replace(plain(5, 8), name="ears")
VERIFY: dict[str, Any] = {"verify": {"live": True}, "engine": {"max_batch_size": 16}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's."""
    write_model(tmp_path / "model", EARS)
    return tmp_path / "model"


def found(server: Server) -> Verification:
    verification = server.default.verification
    assert verification is not None
    return verification


async def step_all(streams: list[AsyncStream], x: F32) -> None:
    """Frames [T, N, features] of N streams."""
    for at in x:
        await asyncio.gather(*(stream.step(frame) for stream, frame in zip(streams, at, strict=True)))


async def checked_stream(server: Server, client: AsyncClient, rng: np.random.Generator) -> tuple[AsyncStream, int]:
    """A stream whose first 20 frames were compared, and the process that did it."""
    stream = await client.open("s")
    await step_all([stream], frames(rng, 20, 1))
    await until(lambda: found(server).frames_total == 20)
    pid = found(server).pid
    assert pid is not None
    return stream, pid
