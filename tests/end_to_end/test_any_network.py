"""What is promised of any recurrent network: each stream has the bits that it has alone.

A hundred and fifty streams come and go at random, beside hostile ones, while the server is killed, continues from its
recording, puts streams to sleep and wakes them, and opens copies from snapshots. Afterwards each stream is stepped
again: alone in a batch size that is certified, and by torch or onnxruntime without the engine. The recording is
verified. One of the networks rounds differently in each row of a batch, and is certified as `tolerance` everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.base import BoundStep
from instep.models.stepping import keep_state, load_state, read_state
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.server.preparation import Prepared
from instep.verify.verifier import verify
from instep_client import AsyncClient, AsyncStream, StreamSnapshot
from tests.chaos.victim import Victim
from tests.support.crowd import Visitor, make_visitors, visit
from tests.support.networks import NETWORKS, Run
from tests.support.running import prepared
from tests.support.verifying import CERTIFY, ignore_progress

CLIENTS, AT_ONCE, SLOTS, MAX_BATCH = 5, 12, 70, 32
"""Fewer slots than streams, so that slots change hands, and fewer rows than open streams, so that batches differ."""
COPIES = 6
SETTINGS = {
    "engine.max_streams": SLOTS,
    "engine.max_batch_size": MAX_BATCH,
    "limits.hibernate_after_s": 0.2,
    "transport.heartbeat_s": 0.5,
}


@pytest.mark.heavy
@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NETWORKS)
async def test_each_stream_has_the_bits_that_it_has_alone(tmp_path: Path, name: str, count: int) -> None:
    case, ready = NETWORKS[name], prepared(NETWORKS[name].model(), MAX_BATCH)
    assert case.exactness in (None, ready.certification.exactness)
    spec, description, rng = ready.network.state, ready.model.description, np.random.default_rng(count)
    visitors = make_visitors(
        rng, spec, description.features, description.outputs, count, any_state=case.steps is not None
    )
    copies = await served(tmp_path, ready, visitors, rng)
    check_verdicts(ready, tmp_path / "recording.db", [*visitors, *copies])
    originals = {f"copy of {visitor.name}": visitor for visitor in visitors}
    for copy in copies:
        assert_equal(ready, copy.y, originals[copy.name].y[-len(copy.y) :], copy)
    for visitor in (*visitors, *copies):
        if visitor.closed is not None:
            assert visitor.final is not None
            assert_equal_states(ready, visitor.closed, visitor.final, visitor)
    steps = [ready.network.bind(rows) for rows in ready.certification.buckets[:3]]
    for number, visitor in enumerate(visitors):
        y, final = alone(ready, steps[number % len(steps)], number, visitor)
        assert visitor.final is not None
        assert_equal(ready, visitor.y, y, visitor)
        assert_equal_states(ready, visitor.final, final, visitor)
    rows = ready.certification.buckets[-1]
    for first in range(0, count, rows):
        batch = visitors[first : first + rows]
        if case.steps is not None:
            check_steps(ready, case.steps(ready), batch)
        whole = None if case.sequence is None else case.sequence(ready)
        check_sequences(ready, whole, batch, has_bits=case.sequence_has_bits)


async def served(folder: Path, ready: Prepared, visitors: Sequence[Visitor], rng: np.random.Generator) -> list[Visitor]:
    """Serve all streams to their ends; the copies that began in the middle of some, from snapshots."""
    arguments = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    frames, may_step = sum(len(visitor.x) for visitor in visitors), asyncio.Event()
    may_step.set()

    async def reach(share: float) -> None:
        while sum(visitor.sent for visitor in visitors) < share * frames:
            await asyncio.sleep(0.01)

    with contextlib.closing(Victim(folder, "commit", arguments, ready.model)) as victim:
        await victim.start()
        async with asyncio.TaskGroup() as tasks:
            clients = [
                tasks.create_task(
                    visit(victim.endpoint, visitors[at::CLIENTS], np.random.default_rng(at), may_step, AT_ONCE)
                )
                for at in range(CLIENTS)
            ]
            await reach(1 / 3)
            victim.kill()
            await victim.start()
            await reach(2 / 3)
            may_step.clear()
            async with AsyncClient(victim.endpoint) as client:
                assert client.info.exactness == ready.certification.exactness
                assert client.info.buckets == ready.certification.buckets
                while (await client.stats())["streams_open"]:
                    await asyncio.sleep(0.02)  # until all sleep
                under_way = [each for each in visitors if each.sent and each.remaining and not each.is_hostile]
                copies = [await copied(client, folder, each) for each in under_way[:COPIES]]
                may_step.set()
                await asyncio.gather(*(finish(stream, copy) for stream, copy in copies))
                assert (await client.stats())["woken_streams_total"] > 0
        assert sum(task.result() for task in clients) > 0, "no frame with NaN was sent"
        victim.stop()
    assert len(copies) == COPIES
    assert inspect(victim.recording, lambda _: None).frames == frames + sum(len(copy.x) for _, copy in copies)
    return [copy for _, copy in copies]


async def copied(client: AsyncClient, folder: Path, visitor: Visitor) -> tuple[AsyncStream, Visitor]:
    """A stream that begins with another's snapshot, and what it will send: the rest of what the other one sends."""
    (await client.snapshot(visitor.name)).save(folder / "snapshot.safetensors")
    snapshot = StreamSnapshot.load(folder / "snapshot.safetensors")
    assert snapshot.seq == visitor.sent
    rest = slice(visitor.sent, None)
    copy = replace(visitor, name=f"copy of {visitor.name}", x=visitor.x[rest], y=visitor.y[rest].copy(), sent=0)
    return await client.restore(snapshot, copy.name), copy


async def finish(stream: AsyncStream, copy: Visitor) -> None:
    for at in range(0, len(copy.x), 3):
        copy.y[at : at + 3] = await stream.step(copy.x[at : at + 3])


@torch.inference_mode()
def alone(ready: Prepared, step: BoundStep, position: int, visitor: Visitor) -> tuple[F32, U8]:
    """Outputs [T, outputs] and the final state [row_bytes] of a stream in one row of a batch of nothing else."""
    rows = len(step.y)
    position, spec, outputs = position % rows, ready.network.state, np.empty_like(visitor.y)
    states = spec.initial(rows)
    states[position] = visitor.initial
    load_state(step, spec, states)
    x, y = step.x.numpy(), step.y.numpy()
    x[...] = 0
    for frame, answer in zip(visitor.x, outputs, strict=True):
        x[position, : len(frame)] = frame
        step.run()
        answer[...] = y[position, : len(answer)]
        keep_state(step)
    return outputs, read_state(step, spec)[position]


def check_verdicts(ready: Prepared, recording: Path, visitors: Sequence[Visitor]) -> None:
    """Verify the recording: bits where they are certified, and otherwise all that huge values do not overflow."""
    with RecordingReader(recording) as reader:
        report = verify(reader, ready.model, [], ignore_progress, CERTIFY)
    hostile, is_exact = {visitor.name: visitor.is_hostile for visitor in visitors}, report.verdict == "exact"
    assert {stream.name for stream in report.streams} == {*hostile}
    assert report.mismatches == 0, report.streams
    assert is_exact == (ready.certification.exactness == "exact")
    assert not is_exact or report.verified
    found = {stream.verdict for stream in report.streams if not hostile[stream.name]}
    assert found <= ({"exact"} if is_exact else {"exact", "within tolerance"}), found


def check_steps(ready: Prepared, run: Run, batch: Sequence[Visitor]) -> None:
    """Compare with frames that are computed one after another, without the engine."""
    x, rows = side_by_side(ready, batch)
    y = []
    for at, frames in enumerate(x):
        outputs, rows = run(frames[None], rows)
        y.append(outputs[0])
        for row, visitor in enumerate(batch):
            if at + 1 == len(visitor.x):
                assert visitor.final is not None
                assert_equal(ready, visitor.y, np.stack(y)[:, row], visitor)
                assert_equal_states(ready, visitor.final, rows[row], visitor)


def check_sequences(ready: Prepared, truth: Run | None, batch: Sequence[Visitor], *, has_bits: bool) -> None:
    """Compare with whole sequences in one call, of the network itself and of torch, where there is one."""
    x, rows = side_by_side(ready, batch)
    found = ready.network.sequence(x, rows)
    for sequences, exact in ((found, True), (truth and truth(x, rows), has_bits)):
        for row, visitor in enumerate(batch if sequences is not None else ()):
            assert sequences is not None
            expected = sequences[0][: len(visitor.x), row]
            if exact and ready.certification.whole_sequence:
                assert_equal(ready, visitor.y, expected, visitor)
            elif not visitor.is_hostile:
                np.testing.assert_allclose(visitor.y, expected, rtol=1e-4, atol=1e-5, err_msg=visitor.name)


def side_by_side(ready: Prepared, batch: Sequence[Visitor]) -> tuple[F32, U8]:
    """Frames [T, R, features] and initial states of streams, filled up with zeros to the largest certified batch."""
    count = ready.certification.buckets[-1]
    x = np.zeros((max(len(each.x) for each in batch), count, batch[0].x.shape[1]), np.float32)
    rows = ready.network.state.initial(count)
    for row, visitor in enumerate(batch):
        x[: len(visitor.x), row], rows[row] = visitor.x, visitor.initial
    return x, rows


def assert_equal(ready: Prepared, found: F32, expected: F32, visitor: Visitor) -> None:
    """Equal bits, NaN being any NaN; within the certified distance in each step where no more than that is promised."""
    assert found.shape == expected.shape, visitor.name
    if ready.certification.exactness == "exact":
        one, other = (np.where(np.isnan(each), np.float32(np.nan), each) for each in (found, expected))
        np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32), err_msg=visitor.name)
    elif not visitor.is_hostile:
        distance = ready.certification.max_ulp * len(visitor.x) * float(np.finfo(np.float32).eps)
        np.testing.assert_allclose(found, expected, rtol=distance, atol=distance, err_msg=visitor.name)


def assert_equal_states(ready: Prepared, found: U8, expected: U8, visitor: Visitor) -> None:
    """As `assert_equal`, of every leaf of a row."""
    leaves = [ready.network.state.unpack(row[None]) for row in (found, expected)]
    for leaf in ready.network.state.leaves:
        one, other = (each[leaf.name][0] for each in leaves)
        if leaf.dtype == np.float32:
            assert_equal(ready, one, other, visitor)
        else:
            np.testing.assert_array_equal(one, other, err_msg=visitor.name)
