"""A server that has what it records checked while it serves."""

from __future__ import annotations

import asyncio
import os
import signal
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
from instep_client import AsyncClient
from tests.support.beside import IN_FRESH_INTERPRETERS, frames, until
from tests.support.live_verifying import EARS, VERIFY, checked_stream, found, step_all
from tests.support.live_verifying import folder as folder
from tests.support.models import plain
from tests.support.running import running
from tests.support.swapping import reload_models

NEWER = replace(plain(5, 8, seed=9), name="ears")


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


async def test_a_wrong_output_is_an_alarm_while_the_server_serves(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    sections = {"recording": {"file": tmp_path / "r.instep"}, **VERIFY}
    async with running(
        EARS, stepper=wrong_stepper, told=told, folder=folder, background=IN_FRESH_INTERPRETERS, **sections
    ) as server:
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
        (event,) = (event for event in server.default.events.since(0) if event.kind == "mismatch")
        assert (event.stream, event.seq) == ("s2", 50)
        wrong = found(server).mismatch
        assert wrong is not None
        assert (wrong.stream, wrong.seq) == ("s2", 50)
        np.testing.assert_array_equal(np.array(wrong.got, np.float32), y)
        y[3] = np.float32(wrong.expected[3])
        np.testing.assert_array_equal(np.array(wrong.expected, np.float32), y)
    shown = found(server).as_json()
    assert shown["state"] == "mismatch"
    assert shown["mismatch"] == {"stream": "s2", "seq": 50, "expected": wrong.expected, "got": wrong.got}
    (alarm,) = (line for line in told if line["event"] == "mismatch")
    assert (alarm["level"], alarm["stream"], alarm["seq"]) == ("error", "s2", 50)
    assert "instep verify" in alarm["next"]


async def numbers(server: Server) -> dict[str, float]:
    async with AsyncClient(server.endpoint) as client:
        return await client.stats()


async def test_everything_is_verified_whatever_happens_to_the_streams(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    recording = {"file": tmp_path / "r.instep", "recovery_target_s": 0.01}
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


async def test_a_history_that_is_trimmed_is_verified_meanwhile(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    recording, told = {"file": tmp_path / "r.instep", "keep_bytes": 700_000}, list[dict[str, Any]]()
    async with running(EARS, folder=folder, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group([f"s{number}" for number in range(8)])
            engine = server.default.engine

            async def trimmed() -> None:
                """Step, and go on until that was trimmed: a checkpoint of now has no new frame before it."""
                await group.step(frames(rng, 16, 8))
                newest = engine.journal.newest
                while not any(line["event"] == "recording trimmed" and line["position"] > newest for line in told):
                    await group.step(frames(rng, 16, 8))
                    await asyncio.sleep(0.01)

            def all_count() -> bool:
                return found(server).frames_total + found(server).skipped == engine.stats.frames_total

            def more_unchecked() -> bool:
                return all_count() and found(server).unchecked > before

            await until(lambda: found(server).reported_s > 0)
            await trimmed()
            for then in (signal.SIGCONT, signal.SIGKILL):
                await until(lambda: all_count() and found(server).share == 1)  # else it may follow none of the eight
                before, pid = found(server).unchecked, found(server).pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)  # in both cases: the one after a kill might read it before it is trimmed
                await trimmed()
                os.kill(pid, then)
                await until(more_unchecked)
            assert found(server).frames_total > 0
            assert found(server).mismatches_total == 0
            assert (await numbers(server))["verify_unchecked_frames_total"] == found(server).unchecked
    (line,) = (line for line in told if line["event"] == "trimmed unchecked")
    assert (line["level"], line["frames"] > 0) == ("warning", True)


async def test_each_model_has_its_checker_and_takes_it_along(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    (tmp_path / "recordings").mkdir()
    write_model(tmp_path / "newer", NEWER)
    told: list[dict[str, Any]] = []
    recording = {"file": tmp_path / "recordings"}
    async with running(EARS, folder=folder, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint, model="ears") as client:
            assert not await reload_models(server, {"ears": folder, "other": tmp_path / "newer"})
            first = server.default
            pids = [service.verification.pid for service in server.services if service.verification is not None]
            stream = await client.open("s")
            await step_all([stream], frames(rng, 40, 1))
            assert not await reload_models(server, {"ears": tmp_path / "newer", "other": tmp_path / "newer"}, "move")
            await step_all([stream], frames(rng, 40, 1))
            assert server.default is not first
            await until(lambda: found(server).frames_total == 40)
            assert found(server).state == "verified"
            assert not await reload_models(server, tmp_path / "newer")
            await until(lambda: not any(is_alive(pid) for pid in pids))
    assert sum(line["event"] == "verifying" for line in told) == 3
    assert not any(line["level"] in ("error", "warning") for line in told)


def is_alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


async def test_a_mismatch_is_told_once_whatever_happens_to_the_checker(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    recording = {"file": tmp_path / "r.instep"}
    async with running(EARS, stepper=wrong_stepper, told=told, folder=folder, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            other = await client.open("other")
            stream, former = await checked_stream(server, client, rng)
            WrongStepper.is_due = True
            await step_all([stream], frames(rng, 1, 1))
            await until(lambda: found(server).mismatches_total == 1)
            os.kill(former, signal.SIGKILL)
            await until(lambda: found(server).pid not in (former, None))
            compared = found(server).frames_total
            await step_all([stream, other], frames(rng, 20, 2))
            await until(lambda: found(server).frames_total >= compared + 20)
            assert found(server).mismatches_total == 1
    assert sum(line["event"] == "mismatch" for line in told) == 1


async def test_what_cannot_be_verified_is_said_and_served(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    recording, nowhere = {"file": tmp_path / "r.instep"}, tmp_path / "nowhere"
    async with running(EARS, folder=nowhere, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            await until(lambda: found(server).state == "off")
            await step_all([await client.open("s")], frames(rng, 20, 1))
    assert "no longer there" in found(server).reason
    assert [line["event"] for line in told if line["level"] == "error"] == ["cannot verify"]


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(ValueError, match="live verification"):
        Config.model_validate({"verify": {"live": True}})
