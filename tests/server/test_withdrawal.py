"""What a server says after a recheck has found other bits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.models.certify import candidate_buckets, certify
from instep.models.registry import build
from instep.recording.reader import RecordingReader
from instep.verify.conditions import find_conditions
from instep.verify.verifier import verify
from instep_client import AsyncClient
from instep_client.protocol.wire import Kind
from tests.support.gated import RARE, gated
from tests.support.leaky import by_hand, leaky
from tests.support.raw import RawClient
from tests.support.running import CPU, running
from tests.support.verifying import ignore_progress

MODEL = leaky(3)
X = np.array([[0.5, 1, -1], [RARE, 2, 3], [0.25, 0, 1]], np.float32)
DIFFER = "frame 1 of stream 's' has other bits in batches of 8 than in those of 4, which served it"


@pytest.fixture(autouse=True)
def _gated() -> Iterator[None]:
    with gated("output"):
        yield


async def until(told: list[dict[str, Any]], event: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while not (lines := [line for line in told if line["event"] == event]):
            await asyncio.sleep(0.01)
    return lines[0]


async def said(endpoint: str) -> str:
    """What WELCOME says of exactness."""
    async with AsyncClient(endpoint) as client:
        return client.info.exactness


def expected(seq: int) -> list[float]:
    """The answer to a frame: where the gate is open, that of a batch of 4."""
    y = by_hand(MODEL, X)[0][seq]
    y[1] += 4 if seq == 1 else 0
    return [float(value) for value in y]


@pytest.mark.parametrize("steps_in", ["process", "thread", "inline"])
async def test_exact_is_withdrawn_when_a_served_frame_has_other_bits_elsewhere(steps_in: str, tmp_path: Path) -> None:
    network = build(MODEL, CPU)
    assert certify(network, candidate_buckets(network, 64)).exactness == "exact", "a trial does not find it"
    told: list[dict[str, Any]] = []
    engine = {"steps_in": steps_in, "recheck_every": 1, "max_batch_size": 64}
    recording = {"file": tmp_path / "r.instep"}
    async with (
        running(MODEL, engine=engine, recording=recording, told=told) as server,
        RawClient(server.endpoint) as client,
        AsyncClient(server.endpoint) as connected,
    ):
        assert await said(server.endpoint) == connected.info.exactness == "exact"
        await client.hello()
        handles = (await client.open("s")).handles()
        assert (await client.step(handles, [0], X[:1, None])).floats().tolist() == expected(0)
        async with asyncio.timeout(60):
            while not (before := await client.statistics())["rechecked_frames_total"]:
                await asyncio.sleep(0.01)
        assert (before["exact"], before["recheck_mismatches_total"]) == (1, 0)
        assert (await client.step(handles, [1], X[1:2, None])).floats().tolist() == expected(1)
        line = await until(told, "exactness withdrawn")
        assert (line["level"], line["exactness"], line["reason"]) == ("error", "tolerance", DIFFER)
        line = await until(told, "bits differ")
        assert line["level"] == "error"
        assert (line["stream"], line["seq"], line["batch_sizes"], line["value"]) == ("s", 1, (4, 8), "output[1]")
        assert line["rechecked"] - line["served"] == 8 - 4
        assert await said(server.endpoint) == "tolerance"
        await connected.ping()
        assert connected.info.exactness == "tolerance", "clients that are connected are told"
        for seq in (2, 3):  # it serves on, and does not fill its log
            await client.step(handles, [seq], X[1:2, None])
        async with asyncio.timeout(60):
            while (after := await client.statistics())["recheck_mismatches_total"] < 3:
                await asyncio.sleep(0.01)
        assert (after["exact"], after["step_failures_total"]) == (0, 0)
        events = [event[2:] for event in server.default.events.since(0, "s") if event.kind != "opened"]
        assert events == [("mismatch", "s", "output[1] in batches of 4 and 8", 1), ("withdrawn", "s", DIFFER, 1)]
    assert len([line for line in told if line["event"] == "bits differ"]) == 1
    with RecordingReader(tmp_path / "r.instep") as reader:
        assert [engine.header.exactness for engine in reader.engines] == ["exact", "tolerance"]
        report = verify(reader, MODEL, [], ignore_progress, find_conditions)
    assert report.streams[0].frames == 4
    assert "the engine ran with exactness tolerance, which promises no bits" in str(report)


async def test_where_exactness_is_required_the_server_drains_and_ends() -> None:
    told: list[dict[str, Any]] = []
    failure = f"engine.exactness is `require`, but {DIFFER}"
    engine = {"exactness": "require", "recheck_every": 1, "max_batch_size": 64}
    async with (
        running(MODEL, engine=engine, told=told, failure=failure) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.step(handles, [0], X[:1, None])
        await client.send(*client.step_message(handles, [1], X[1:, None]))
        assert (await client.receive()).floats().tolist() == [*expected(1), *expected(2)]
        assert (await until(told, "failed"))["reason"] == failure
        async with asyncio.timeout(60):
            while (reply := await client.receive()).kind is not Kind.GOODBYE:
                pass
        assert failure in str(reply.header)
        assert server.unanswered_messages == 0


async def test_nothing_is_rechecked_where_it_is_off() -> None:
    async with running(MODEL, engine={"recheck_every": 0, "max_batch_size": 64}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.step(handles, [0], X[:, None])
            values = await client.statistics()
        assert (values["exact"], values["rechecked_frames_total"]) == (1, 0)
