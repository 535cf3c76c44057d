"""What a server counts, against what was sent to it, what came back, and the files that it wrote."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep.config import Config
from instep.core.histogram import ENTRIES
from instep.core.typing import F32, I64
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared
from instep_client.protocol.wire import Code, Kind
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames

STEP_S = 0.02


class SlowStepper(Stepper):
    """Each step takes `STEP_S` longer."""

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        time.sleep(STEP_S)
        super().step(slots, rows, inputs, outputs)


def slow(ready: Prepared, config: Config) -> Stepper:
    return SlowStepper(ready.network, config.engine.max_batch_size, config.engine.max_streams, ready.device)


async def test_frames_and_refusals_are_counted_as_they_were_sent(rng: np.random.Generator) -> None:
    refused, received = Counter[Code](), 0
    async with running(SMALL, limits={"credit_frames": 16, "max_block_frames": 16}) as server:
        async with RawClient(server.endpoint) as client, RawClient(server.endpoint) as stranger:
            await client.hello()
            reply = await client.open("a", "b", "a", "c", "")
            refused.update({Code.NAME_IN_USE: 1, Code.BAD_NAME: 1})
            a, b, c = (handle for handle in reply.handles() if handle)

            async def step(handles: list[int], seqs: list[int], x: F32) -> list[Code]:
                nonlocal received
                received += x.shape[0] * x.shape[1]
                reply = await client.step(handles, seqs, x)
                if reply.kind is Kind.ERROR:
                    return [reply.code]
                return [code for _, _, code, _ in reply.failures()]

            x = random_frames(rng, 3, 2)
            assert await step([a, b], [0, 0], x) == []
            assert await step([a, b], [0, 0], x) == []  # repeated
            assert await step([a, b], [2, 2], np.concatenate([x[2:], random_frames(rng, 1, 2)])) == []  # half of it
            bad = random_frames(rng, 1, 2)
            bad[0, 1] = np.nan
            for handles, seqs, frames, code in (
                ([a, b], [9, 4], random_frames(rng, 1, 2), Code.SEQ_GAP),
                ([a, b], [4, 5], bad, Code.NOT_FINITE),
                ([a, a + 1], [5, 0], random_frames(rng, 1, 2), Code.UNKNOWN_STREAM),
                ([a, a], [6, 6], random_frames(rng, 1, 2), Code.REPEATED_STREAM),
            ):
                assert await step(handles, seqs, frames) == [code]
                refused[code] += 1
            assert await step([c], [0], random_frames(rng, 16)) == [], "it takes all of the credit"
            await client.send(b"nonsense")
            assert (await client.receive()).code is Code.MALFORMED
            assert (await stranger.ask(msgpack.packb([Kind.PING, 1]))).code is Code.HELLO_FIRST  # which is not counted
            assert (await stranger.ask(msgpack.packb([Kind.STATS, 1]))).code is Code.HELLO_FIRST
            assert (await client.resume(["nobody"], [0], [0])).kind is Kind.RESUMED
            refused.update({Code.MALFORMED: 1, Code.HELLO_FIRST: 1, Code.UNKNOWN_STREAM: 1})
            numbers = await client.statistics()
    counted = {name: value for name, value in numbers.items() if name.startswith("refused_")}
    assert counted == {
        **{f"refused_{code.name.lower()}_total": count for code, count in refused.items()},
        "refused_total": refused.total(),
        "refused_messages_total": 3,
    }
    assert numbers["received_frames_total"] == received
    assert numbers["repeated_frames_total"] == 6 + 2
    assert numbers["frames_total"] == 6 + 2 + 1 + 1 + 1 + 16
    assert numbers["credit_stalls_total"] == 1


async def test_times_are_those_that_a_client_and_a_slow_step_see(rng: np.random.Generator) -> None:
    waited_s: list[float] = []
    began_s = time.monotonic()
    async with running(SMALL, stepper=slow) as server, RawClient(server.endpoint) as client:
        stats = server.default.engine.stats
        await client.hello()
        handles = (await client.open("s")).handles()
        while len(server.default.history) < 2:
            sent_s = time.monotonic()
            await client.step(handles, [len(waited_s)], random_frames(rng, 1), [len(waited_s)])
            waited_s.append(time.monotonic() - sent_s)
        numbers = await client.statistics()
    lived_s, steps = time.monotonic() - began_s, len(waited_s)
    assert stats.latency_us[:ENTRIES].sum() == stats.queue_us[:ENTRIES].sum() == numbers["batches_total"] == steps
    assert STEP_S * steps * 1e6 <= stats.compute_us[ENTRIES] <= stats.latency_us[ENTRIES] <= sum(waited_s) * 1e6
    truth = float(np.quantile(waited_s, 0.5)) * 1e6
    assert STEP_S * 1e6 <= numbers["latency_us_p50"] <= truth * 1.125
    assert STEP_S * steps <= numbers["executor_busy_s_total"] <= sum(waited_s)
    ratio = numbers["step_time_ratio"]
    assert STEP_S * steps * 0.5 / lived_s <= ratio <= 1 + max(waited_s), "a step counts in the second in which it ends"
    assert 0 < numbers["loop_busy_s_total"] < lived_s - numbers["executor_busy_s_total"], "it does not step here"
    assert max(numbers["uptime_s"], numbers["server_uptime_s"]) <= lived_s


@pytest.mark.parametrize("durability", ["commit", "fsync"])
async def test_a_recording_is_counted_as_its_files_are(
    tmp_path: Path, rng: np.random.Generator, durability: str
) -> None:
    file, began_s = tmp_path / "r.instep", time.monotonic()
    recording = {"file": file, "durability": durability}
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        service = server.default
        await client.hello()
        handles = (await client.open("s")).handles()
        for seq in range(20):
            await client.step(handles, [seq], random_frames(rng, 1), [seq])
        files = [file, file.with_name("r.instep-wal")]
        before = sum(each.stat().st_size for each in files)
        numbers = await client.statistics()
        assert 0 < before <= numbers["recording_bytes"] <= sum(each.stat().st_size for each in files)
        assert "recovery_s" not in numbers
        assert numbers["replay_s"] > 0
        commits = service.engine.stats.commit_us
        assert commits[:ENTRIES].sum() >= 20, "each answer waits for a commit"
        assert 0 < numbers["commit_us_p50"] <= numbers["commit_us_p99"]
        assert commits[ENTRIES] / 1e6 <= time.monotonic() - began_s
        await asyncio.sleep(0.05)
        before_s = time.monotonic()
        await service.checkpoints.take()
        numbers = await client.statistics()
        assert 0 <= numbers["checkpoint_age_s"] <= time.monotonic() - before_s
        assert numbers["replay_s"] == 0
        assert [event.detail for event in service.events.since(0) if event.kind == "checkpoint"] == ["1 states"]
    began_s = time.monotonic()
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        assert 0 < (await client.statistics())["recovery_s"] <= time.monotonic() - began_s
