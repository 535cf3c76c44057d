from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.wire import Kind
from instep_tools.connect import Target
from instep_tools.load import processes
from instep_tools.load.generator import SAMPLE, PartResult
from instep_tools.load.plan import LoadPart, LoadPlan
from instep_tools.load.processes import merge, run_parts
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem
from tests.support.fake_server import FakeServer, Message
from tests.tools.load_workers import die, never_end, signalled

PLAN = LoadPlan(streams=4, connections=2, processes=2, rate_hz=64.0, duration_s=0.25, warmup_s=0.125)
PART = LoadPart("load-0", ((2,),), PLAN)
PARTS = [PART, replace(PART, name="load-1", offset=0.5)]


def test_results_are_merged() -> None:
    one = PartResult(np.zeros(2, SAMPLE), Counter(BUSY=1), unanswered=3, unsent=1)
    other = PartResult(np.ones(1, SAMPLE), Counter(BUSY=2, IDLE=1), unanswered=4, stopped=True, lost="gone")
    merged = merge([one, other])
    assert merged.samples["at_s"].tolist() == [0, 0, 1]
    assert merged.refused == {"BUSY": 3, "IDLE": 1}
    assert (merged.unanswered, merged.unsent, merged.stopped, merged.lost) == (7, 1, True, "gone")


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS])
async def test_every_part_sends_its_frames(parts: list[LoadPart]) -> None:
    with FakeServer() as server:
        result = await run_parts(parts, Target(server.endpoint), Stop())
        assert server.rules.kinds.count(Kind.HELLO) == len(parts)
        assert server.rules.names == {}
    assert result.samples["frames"].tolist() == [2] * 16 * len(parts)
    assert (result.refused, result.unanswered, result.stopped, result.lost) == ({}, 0, False, "")


async def test_a_stop_reaches_the_processes() -> None:
    stop = Stop()
    with FakeServer() as server:
        rules, loop = server.rules, asyncio.get_running_loop()

        def stop_at_ten(header: list[Any], frames: list[bytes]) -> list[Message] | None:
            if len(rules.blocks) == 10:
                loop.call_soon_threadsafe(stop.request)
            return None

        rules.fault = stop_at_ten
        long = [replace(part, plan=replace(PLAN, duration_s=1000.0)) for part in PARTS]
        result = await run_parts(long, Target(server.endpoint), stop)
        assert rules.names == {}
    assert result.stopped


async def test_a_process_that_cannot_open_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as server:
        server.rules.occupy("load-1-0-0")
        with pytest.raises(CommandProblem, match="NAME_IN_USE"):
            await run_parts(PARTS, Target(server.endpoint), Stop())
        assert list(server.rules.names) == ["load-1-0-0"]
        assert Kind.STEP not in server.rules.kinds
    monkeypatch.setattr(processes, "work", die)
    with pytest.raises(CommandProblem, match="was killed"):
        await run_parts(PARTS, Target("tcp://127.0.0.1:1"), Stop())


async def test_a_cancellation_waits_for_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "work", never_end)
    running = asyncio.create_task(run_parts(PARTS, Target("tcp://127.0.0.1:1"), Stop()))
    while len(multiprocessing.active_children()) < len(PARTS):
        await asyncio.sleep(0.01)
    running.cancel()
    ended, _ = await asyncio.wait([running], timeout=30)
    assert ended == {running}
    assert running.cancelled()
    assert multiprocessing.active_children() == []


async def test_signals_to_the_process_group_do_not_end_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "work", signalled)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with FakeServer() as server:
        result = await run_parts(PARTS, Target(server.endpoint), Stop())
    assert (len(result.samples), result.stopped) == (32, False)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
