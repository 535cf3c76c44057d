"""A server that has what it records checked while it serves, by one process for all of its models."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pytest

from instep.config import Config
from instep.core.typing import F32, I64
from instep.models.folder import write_model
from instep.runtime.stepper import Stepper
from instep.server.live_verification import LINE_BYTES, Supervision
from instep.server.preparation import Prepared
from instep.server.server import Server
from instep.streaming.verification import Verification
from instep_client import AsyncClient, AsyncStream
from tests.support.models import plain
from tests.support.running import IN_FORKS, running

EARS = replace(plain(5, 8), name="ears")
OTHER = replace(plain(5, 8, seed=9), name="other")
VERIFY: dict[str, Any] = {"verify": {"live": True}, "engine": {"max_batch_size": 16}}


async def start_program(code: str) -> Process:
    """Run a program instead of the one that checks."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=LINE_BYTES
    )


IN_A_FRESH_INTERPRETER: Final = Supervision(
    partial(start_program, "import instep.replay.live_process as live; live.main()"),
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


class WrongStepper(Stepper):
    """Answers one frame with another output than the network computes, once `is_due`."""

    is_due = False

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        super().step(slots, rows, inputs, outputs)
        if self.is_due and len(slots):
            WrongStepper.is_due = False
            outputs[rows[0], 3] += np.float32(0.125)


def wrong_stepper(each: Prepared, config: Config) -> Stepper:
    return WrongStepper(each.network, config.engine.max_batch_size, config.engine.max_streams, each.device)


async def test_a_wrong_output_is_told_once_whatever_happens_to_the_process(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    sections = {"recording": {"path": tmp_path / "r.instep"}, **VERIFY}
    async with running(
        EARS, stepper=wrong_stepper, told=told, folder=folder, supervision=IN_A_FRESH_INTERPRETER, **sections
    ) as server:
        async with AsyncClient(server.endpoint) as client:
            streams = [await client.open(f"s{number}") for number in range(4)]
            await step_all(streams, frames(rng, 50, 4))
            await until(lambda: found(server).frames_total == 200)
            assert found(server).state == "verified"
            WrongStepper.is_due = True
            y = await streams[2].step(frames(rng))
            await until(lambda: found(server).mismatches_total == 1)
            assert (await client.stats())["verify_mismatches_total"] == 1
            former, compared = found(server).pid, found(server).frames_total
            assert former is not None
            os.kill(former, signal.SIGKILL)
            await step_all(streams, frames(rng, 5, 4))
            await until(lambda: found(server).frames_total >= compared + 15)
        assert (found(server).state, found(server).mismatches_total) == ("mismatch", 1)
        (event,) = (event for event in server.default.events.since(0) if event.kind == "mismatch")
        assert (event.stream, event.seq) == ("s2", 50)
        wrong = found(server).mismatch
        assert wrong is not None
        assert (wrong.stream, wrong.seq, wrong.position > 50) == ("s2", 50, True)
        np.testing.assert_array_equal(np.array(wrong.got, np.float32), y)
        y[3] = np.float32(wrong.expected[3])
        np.testing.assert_array_equal(np.array(wrong.expected, np.float32), y)
    assert found(server).as_json()["mismatch"] == {
        "stream": "s2",
        "seq": 50,
        "position": wrong.position,
        "expected": wrong.expected,
        "got": wrong.got,
    }
    (alarm,) = (line for line in told if line["event"] == "mismatch")
    assert (alarm["level"], alarm["stream"], alarm["seq"], alarm["position"]) == ("error", "s2", 50, wrong.position)
    assert "instep verify" in alarm["next"]


async def test_everything_is_verified_whatever_happens_to_the_streams(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    recording = {"path": tmp_path / "r.instep", "recovery_target_s": 0.01}
    limits = {"hibernate_after_s": 0.1}
    sections: dict[str, Any] = {"recording": recording, "limits": limits, **VERIFY}
    async with running(EARS, folder=folder, **sections) as server, AsyncClient(server.endpoint) as client:
        streams = [await client.open(f"s{number}") for number in range(6)]
        await step_all(streams, frames(rng, 30, 6))
        fork = await streams[0].fork("fork")
        await streams[1].reset()
        await streams[2].reset((await client.snapshot("s3")).state)
        await step_all([*streams, fork], frames(rng, 30, 7))
        await until(lambda: len(server.default.operations.hibernation) == 7)
        await step_all([*streams, fork], frames(rng, 30, 7))
        await streams[4].close()
        stepped = server.default.engine.stats.frames_total
        assert stepped == 180 + 210 + 210
        await until(lambda: found(server).frames_total == stepped)
        assert (found(server).state, found(server).skipped, found(server).mismatches_total) == ("verified", 0, 0)
        await client.close(park=True)
    async with running(EARS, folder=folder, **sections) as server, AsyncClient(server.endpoint) as client:
        await until(lambda: found(server).reported_s > 0)
        streams = [await client.resume(f"s{number}", take_over=True) for number in range(4)]
        await step_all(streams, frames(rng, 30, 4))
        await until(lambda: found(server).frames_total >= 120)
        assert (found(server).state, found(server).mismatches_total) == ("verified", 0)


async def test_a_history_that_is_trimmed_while_the_process_is_stopped_is_told_of(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    recording, told = {"path": tmp_path / "r.instep", "keep_bytes": 700_000}, list[dict[str, Any]]()
    async with running(EARS, folder=folder, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group([f"s{number}" for number in range(8)])
            engine = server.default.engine
            await group.step(frames(rng, 16, 8))
            await until(lambda: found(server).frames_total == 128)
            pid, newest = found(server).pid, engine.journal.newest
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            while not any(line["event"] == "recording trimmed" and line["position"] > newest for line in told):
                await group.step(frames(rng, 16, 8))
                await asyncio.sleep(0.01)
            await until(lambda: found(server).lag_s > 2)
            os.kill(pid, signal.SIGCONT)
            await until(lambda: found(server).frames_total + found(server).skipped == engine.stats.frames_total)
            assert found(server).skipped > 0
            assert (await client.stats())["verify_skipped_frames_total"] == found(server).skipped
            await group.step(frames(rng, 16, 8))
            await until(lambda: found(server).frames_total + found(server).skipped == engine.stats.frames_total)
            assert found(server).mismatches_total == 0
            skipped = [line for line in told if line["event"] == "skipped"]
            assert sum(line["frames"] for line in skipped) == found(server).skipped
            assert skipped[0]["next"] == f"instep verify {recording['path']}"
    (line,) = (line for line in told if line["event"] == "trimmed unchecked")
    assert line["level"] == "warning"


async def test_one_process_checks_all_models(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    write_model(tmp_path / "other", OTHER)
    told: list[dict[str, Any]] = []
    sections = {"recording": {"path": tmp_path / "recordings"}, **VERIFY}
    async with running(EARS, folder=folder, told=told, **sections) as server:
        server.loader.reload(Config.model_validate({"model": {"folder": [folder, tmp_path / "other"]}}).model)
        await until(lambda: len(server.services) == 2)
        checks = [service.verification for service in server.services]
        for model in ("ears", "other"):
            async with AsyncClient(server.endpoint, model=model) as client:
                await (await client.open("s")).step(frames(rng, 40))
        await until(lambda: [each and each.frames_total for each in checks] == [40, 40])
        assert len({each.pid for each in checks if each}) == 1
        pid = found(server).pid
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert not any(line["level"] in ("error", "warning") for line in told)


async def test_what_cannot_be_verified_is_said_and_served(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    recording, nowhere = {"path": tmp_path / "r.instep"}, tmp_path / "nowhere"
    async with running(EARS, folder=nowhere, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            await until(lambda: found(server).state == "off")
            assert found(server).is_late, "nothing is checked"
            await step_all([await client.open("s")], frames(rng, 20, 1))
    assert [line["event"] for line in told if line["level"] == "error"] == ["cannot verify"]


async def test_a_process_that_hangs_holds_nobody_up(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    told, file, wal = list[dict[str, Any]](), tmp_path / "r.instep", tmp_path / "r.instep-wal"
    supervision = replace(IN_FORKS, most_wal_bytes=3 * 2**20)
    sections = {"recording": {"path": file}, **VERIFY}
    async with running(EARS, folder=folder, told=told, supervision=supervision, **sections) as server:
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("s")
            await step_all([stream], frames(rng, 20, 1))
            await until(lambda: found(server).frames_total == 20)
            former = found(server).pid
            assert former is not None
            os.kill(former, signal.SIGSTOP)
            await step_all([stream], frames(rng, 20, 1))
            await until(lambda: found(server).lag_s > 2)
            assert (found(server).frames_total, found(server).pid) == (20, former)
            with closing(sqlite3.connect(file, isolation_level=None)) as reader:
                # As if the process had been stopped in the middle of a read: else the WAL is written over and over.
                reader.execute("BEGIN")
                reader.execute("SELECT position FROM newest").fetchall()
                while wal.stat().st_size <= supervision.most_wal_bytes:
                    await step_all([stream], frames(rng, 20, 1))
                await until(lambda: found(server).pid not in (former, None))
    assert any(line["event"] == "checker killed" for line in told)
