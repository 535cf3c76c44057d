"""What a server counts, against what was sent to it, what came back, and the files that it wrote."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep.core.histogram import ENTRIES
from instep.core.typing import F32
from instep_client.protocol.wire import Code, Kind
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames


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


@pytest.mark.parametrize("durability", ["commit", "fsync"])
async def test_a_recording_is_counted_as_its_files_are(
    tmp_path: Path, rng: np.random.Generator, durability: str
) -> None:
    file, began_s = tmp_path / "r.instep", time.monotonic()
    recording = {"path": file, "durability": durability}
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
