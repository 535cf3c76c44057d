"""A server that has what it records checked while it serves."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.config import Config
from instep.core.typing import F32, I64
from instep.models.folder import write_model
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared
from instep.server.server import Server
from instep.streaming.verification import Verification
from instep.verify import live
from instep_client import AsyncClient, AsyncStream
from tests.support.models import plain
from tests.support.running import prepared, running

EARS = replace(plain(5, 8), name="ears")
NEWER = replace(plain(5, 8, seed=9), name="ears")
VERIFY: dict[str, Any] = {"verify": {"live": True}, "engine": {"max_batch_size": 16}}


def command(file: Path, start: int) -> list[str]:
    """As `live.command`, but a busy machine does not keep it from checking at all."""
    code = f"from instep.verify import live; live.run_in_the_background = int; live.main([{str(file)!r}, '{start}'])"
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "command", command)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's; skips where the machine promises no bits."""
    if prepared(EARS, 16).certification.exactness != "exact":
        pytest.skip("this machine does not certify that bits repeat")
    write_model(tmp_path / "model", EARS)
    return tmp_path / "model"


class WrongStepper(Stepper):
    """Answers one frame with another output than the network computes, once `is_due`."""

    is_due = False

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        super().step(slots, rows, inputs, outputs)
        if self.is_due and len(slots):
            WrongStepper.is_due = False
            outputs[rows[0], 3] += np.float32(0.125)


def wrong_stepper(each: Prepared, config: Config) -> Stepper:
    return WrongStepper(each.network, each.certification.buckets, config.engine.max_streams, each.device)


def found(server: Server) -> Verification:
    verification = server.default.verification
    assert verification is not None
    return verification


async def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        await asyncio.sleep(0.02)


def frames(rng: np.random.Generator, *shape: int) -> F32:
    return rng.standard_normal((*shape, 5)).astype(np.float32)


async def step_all(streams: list[AsyncStream], x: F32) -> None:
    """Frames [T, N, features] of N streams."""
    for at in x:
        await asyncio.gather(*(stream.step(frame) for stream, frame in zip(streams, at, strict=True)))


async def test_a_wrong_output_is_an_alarm_while_the_server_serves(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    recording = {"file": tmp_path / "r.instep"}
    async with running(EARS, stepper=wrong_stepper, told=told, folder=folder, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            streams = [await client.open(f"s{number}") for number in range(4)]
            await step_all(streams, frames(rng, 50, 4))
            await until(lambda: found(server).frames_total == 200)
            assert found(server).state == "verified"
            WrongStepper.is_due = True
            y = await streams[2].step(frames(rng))
            await until(lambda: found(server).mismatches_total == 1)
            await step_all(streams, frames(rng, 5, 4))
        assert found(server).state == "mismatch"
        assert (await numbers(server))["verify_mismatches_total"] == 1
        wrong = found(server).mismatch
        assert wrong is not None
        assert (wrong.stream, wrong.seq) == ("s2", 50)
        np.testing.assert_array_equal(np.array(wrong.got, np.float32), y)
        y[3] = np.float32(wrong.expected[3])
        np.testing.assert_array_equal(np.array(wrong.expected, np.float32), y)
    (alarm,) = (line for line in told if line["event"] == "mismatch")
    assert (alarm["level"], alarm["stream"], alarm["seq"]) == ("error", "s2", 50)
    assert "instep verify" in alarm["next"]


async def numbers(server: Server) -> dict[str, float]:
    async with AsyncClient(server.endpoint) as client:
        return await client.stats()
