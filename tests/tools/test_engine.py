"""The commands against the engine itself."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from instep.streaming.verification import Verification
from instep_client import AsyncClient
from instep_tools import state
from instep_tools.connect import Target
from instep_tools.formats.read import read_sequences
from instep_tools.load import generator
from instep_tools.load.app import LoadTest
from instep_tools.load.plan import LoadPlan
from instep_tools.pacing import Pace, Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.send import SendJob, send
from instep_tools.sequences import RecordedSequences
from instep_tools.server import ping
from tests.support.models import SEED_SIZED, SMALL, whole
from tests.support.running import running
from tests.support.steps import eager, exported
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table


async def test_what_was_sent_is_recorded_and_gives_the_same_bits_again(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    recording, lengths = tmp_path / "r.instep", np.array([20, 1, 50, 3, 50])
    h = rng.standard_normal((1, 4), np.float32)
    x = rng.standard_normal((124, 3), np.float32)
    save_table(tmp_path / "in.npz", RecordedSequences(tuple("abcde"), lengths, x, initial_states={2: {"h": h}}))
    np.save(tmp_path / "noise.npy", rng.standard_normal((3, 20, 3)))
    clock = JumpingClock()
    async with running(SEED_SIZED, recording={"path": recording}) as server:
        target = Target(server.endpoint)
        live = SendJob(target, Pace(10.0, 20), tmp_path / "noise.npy", output=tmp_path / "live.npz")
        assert await send(live, RememberingTerminal(), Stop(), clock) == Exit.OK
        again = SendJob(target, file=tmp_path / "in.npz", output=tmp_path / "outputs.npz")
        assert await send(again, RememberingTerminal(), Stop(), clock) == Exit.OK
    parts = np.split(x, np.cumsum(lengths)[:-1])
    truth = [whole(SEED_SIZED, part, h if row == 2 else None)[0] for row, part in enumerate(parts)]
    np.testing.assert_array_equal(read_sequences(tmp_path / "outputs.npz").outputs, np.concatenate(truth))
    assert sorted(read_sequences(recording).lengths.tolist()) == sorted([20, 20, 20, *lengths.tolist()])
    async with running(SEED_SIZED) as server:
        for file in (tmp_path / "live.npz", tmp_path / "outputs.npz", recording):
            for speed in (1.0, math.inf) if file is recording else (math.inf,):
                terminal = RememberingTerminal(as_json=True)
                job = SendJob(Target(server.endpoint), Pace(speed=speed), file, check=True)
                assert await send(job, terminal, Stop(), clock) == Exit.OK
                assert terminal.json()["check"]["different"] == 0


async def test_a_load_test_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "STALL_S", math.inf)  # those of the machine, in real time
    plan = LoadPlan(streams=20, connections=3, processes=1, rate_hz=32.0, duration_s=1.0, warmup_s=0.25, block=4)
    terminal = RememberingTerminal(as_json=True)
    async with running(SEED_SIZED) as server:
        test = LoadTest(Target(server.endpoint), plan, None, terminal, Stop(), JumpingClock())
        assert await test.run() == Exit.OK
    values = terminal.json()
    assert (values["refused_frames"], values["unanswered_frames"]) == ({}, 0)
    assert values["latency_us"]["compute"]["max"] > 0


async def test_numbers_that_are_not_finite_or_not_measured_are_shown() -> None:
    shown, told = RememberingTerminal(), RememberingTerminal(as_json=True)
    async with running(SEED_SIZED) as server:
        server.default.verification = Verification(reported_lag_s=math.inf)
        while not len(server.default.history):
            await asyncio.sleep(0.05)
        for terminal in (shown, told):
            assert await ping(Target(server.endpoint), terminal, Stop(), all=True) == Exit.OK
    rows = [line.split() for line in shown.said.splitlines()]
    assert ["verify", "lag", "not", "finite", "s"] in rows
    assert any(row[-4:] == ["batch", "size", "mean", "–"] for row in rows)
    values = told.json()["numbers"]
    assert (values["recent_time_s"] > 0, values["latency_us_p99"], values["verify_lag_s"]) == (True, 0, None)


async def test_a_state_of_single_values_is_json(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, exported("counting").description.features)).astype(np.float32)
    _, leaves = eager("counting", x, 1)
    async with running(exported("counting")) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic")
        await stream.step(x)
        terminal = RememberingTerminal(as_json=True)
        assert await state.read(Target(server.endpoint), terminal, Stop(), "mic") == Exit.OK
    found = terminal.json()["state"]
    assert found["count"] == leaves[0].item()
    for given, leaf in zip(found.values(), leaves, strict=True):
        np.testing.assert_allclose(given, leaf, rtol=1e-5, atol=1e-6)


async def test_a_state_moves_from_one_engine_to_another_and_goes_on_to_the_bit(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((9, SEED_SIZED.description.features)).astype(np.float32)
    y, _ = whole(SEED_SIZED, x)
    path, stop, terminal = tmp_path / "mic.safetensors", Stop(), RememberingTerminal(as_json=True)
    async with running(SEED_SIZED) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic")
        await stream.step(x[:5])
        assert await state.save(Target(server.endpoint), RememberingTerminal(), stop, "mic", path) == Exit.OK
        np.testing.assert_array_equal(await stream.step(x[5:]), y[5:])
    np.testing.assert_array_equal(load_file(path)["state.h"], whole(SEED_SIZED, x[:5])[1])
    async with running(SEED_SIZED, transport={"heartbeat_s": 0.1}) as server, AsyncClient(server.endpoint) as client:
        assert await state.restore(Target(server.endpoint), terminal, stop, path) == Exit.OK
        restored = await client.resume("mic", epoch=terminal.json()["epoch"])
        np.testing.assert_array_equal(await restored.step(x[5:]), y[5:])
    async with running(SMALL) as server:
        with pytest.raises(CommandProblem, match="weights"):
            await state.restore(Target(server.endpoint), RememberingTerminal(), stop, path)
        assert server.default.engine.table.open_count == 0
