"""What is promised of any recurrent network: each stream has the bits that it has alone.

A hundred streams come and go at random, beside hostile ones, while the server is killed, continues from its
recording, puts streams to sleep and wakes them, and opens copies from snapshots. Afterwards each stream is stepped
again: alone, by the definition of the arithmetic, and by torch or onnxruntime within rounding errors. The recording is
verified.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from instep.core.typing import F32, U8
from instep.models.base import step_frames
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.replay.verifier import verify
from instep.server.preparation import Prepared
from instep_client import AsyncClient, AsyncGroup, AsyncStream, ConnectionFailed, FramesRefused, StreamSnapshot
from instep_client.protocol.state_spec import StateSpec
from instep_client.states import as_state, state_rows
from tests.chaos.victim import Victim
from tests.support.networks import NETWORKS, Run
from tests.support.running import prepared
from tests.support.verifying import ignore_progress

HUGE: Final = np.array([1e30, -1e30, np.finfo(np.float32).max, np.finfo(np.float32).min], np.float32)
LONGEST_CHUNK: Final = 8


@dataclass(eq=False)
class Visitor:
    """One stream: what it sends, and what came back."""

    name: str
    x: F32
    """float32 [T, features]."""
    initial: U8
    """The state that it begins with [row_bytes]."""
    y: F32
    """float32 [T, outputs], NaN where nothing came back yet."""
    pace: float
    """The chance that it takes part in a round."""
    is_hostile: bool
    """Whether it sends huge values, and NaN, which must be refused."""
    sent: int = 0
    final: U8 | None = None
    """The state after its last frame [row_bytes]."""
    closed: U8 | None = None
    """The state that its end gave [row_bytes]; the server may have been killed in between, and have replayed it."""

    @property
    def remaining(self) -> int:
        return len(self.x) - self.sent


def make_visitors(
    rng: np.random.Generator, spec: StateSpec, features: int, outputs: int, count: int, *, any_state: bool
) -> list[Visitor]:
    """Streams of random frames and lengths, an eighth of them hostile.

    Args:
        rng: decides everything.
        spec: of the state.
        features: of a frame.
        outputs: of an answer.
        count: how many streams.
        any_state: whether a third of them begin with random values in their float32 leaves.
    """
    visitors = []
    for index in range(count):
        length, is_hostile = int(rng.integers(6, 41)), rng.random() < 1 / 8
        x = (rng.choice([0.1, 1, 3]) * rng.standard_normal((length, features))).astype(np.float32)
        if is_hostile:
            huge = rng.random(x.shape) < 0.2
            x[huge] = rng.choice(HUGE, int(huge.sum()))
        initial = spec.initial(1)
        if any_state and rng.random() < 1 / 3:
            for leaf in spec.unpack(initial).values():
                if leaf.dtype == np.float32:
                    leaf[...] = rng.uniform(-0.5, 0.5, leaf.shape)
        y = np.full((length, outputs), np.nan, np.float32)
        visitors.append(
            Visitor(f"visitor-{index}", x, initial[0], y, float(rng.choice([0.2, 0.5, 1.0])), bool(is_hostile))
        )
    return visitors


async def visit(
    endpoint: str, visitors: Sequence[Visitor], rng: np.random.Generator, may_step: asyncio.Event, at_once: int
) -> int:
    """One client that takes all these streams from their opening to their end, in groups of 1 to 12.

    Args:
        endpoint: of the server, which may die and come back meanwhile.
        visitors: the streams.
        rng: decides everything but the order in which answers come.
        may_step: the client waits while it is not set.
        at_once: how many streams are open at most.

    Returns:
        How many frames were refused, as they had to be.
    """
    waiting, groups, refused = list(visitors), list[tuple[AsyncGroup, list[Visitor]]](), 0
    async with AsyncClient(endpoint, timeout_s=60) as client:
        while waiting or groups:
            await may_step.wait()
            room = at_once - sum(len(own) for _, own in groups)
            if waiting and room and (not groups or rng.random() < 0.5):
                count = min(int(rng.integers(1, 13)), room)
                own, waiting = waiting[:count], waiting[count:]
                states = as_state(np.stack([each.initial for each in own]), client.info.state, single=False)
                names = [each.name for each in own]
                try:
                    group = await client.open_group(names, states)
                except ConnectionFailed:  # the server was killed before it could answer, and has opened them
                    group = await client.resume_group(names, take_over=True)
                groups.append((group, own))
            refused += sum(await asyncio.gather(*(_step(group, own, rng) for group, own in groups)))
            for group, own in [each for each in groups if not any(visitor.remaining for visitor in each[1])]:
                groups.remove((group, own))
                spec = client.info.state
                _, states = await group.read_state()  # if the server is killed as it closes them, the answer is lost
                closed = state_rows(await group.close(), spec, len(own))
                for visitor, final, also in zip(own, state_rows(states, spec, len(own)), closed, strict=True):
                    visitor.final = final
                    visitor.closed = None if also.tobytes() == spec.missing(1).tobytes() else also
    return refused


async def _step(group: AsyncGroup, own: Sequence[Visitor], rng: np.random.Generator) -> int:
    """Send a block of frames of some streams; how many of them were refused."""
    rows = [row for row, visitor in enumerate(own) if visitor.remaining and rng.random() < visitor.pace]
    if not rows:
        return 0
    chosen = [own[row] for row in rows]
    count = min(int(rng.integers(1, LONGEST_CHUNK + 1)), *(visitor.remaining for visitor in chosen))
    x = np.stack([visitor.x[visitor.sent :][:count] for visitor in chosen], axis=1)
    applied = np.full(len(chosen), count)
    for column, visitor in enumerate(chosen):
        if visitor.is_hostile and rng.random() < 0.3:
            applied[column] = rng.integers(count)
            x[applied[column], column, rng.integers(x.shape[2])] = np.nan
    failed = set[str]()
    try:
        y = await group.step(x, rows)
    except FramesRefused as error:
        y, failed = error.outputs, {failure.stream for failure in error.failures}
    assert failed == {visitor.name for visitor, frames in zip(chosen, applied, strict=True) if frames < count}
    for column, (visitor, frames) in enumerate(zip(chosen, applied.tolist(), strict=True)):
        visitor.y[visitor.sent : visitor.sent + frames] = y[:frames, column]
        visitor.sent += frames
    return int((count - applied).sum())


CLIENTS, AT_ONCE, SLOTS, MAX_BATCH = 5, 12, 70, 32
"""Fewer slots than streams, so that slots change hands, and fewer rows than open streams, so that batches differ."""
COPIES = 6
AT_ONCE_HERE = 512
"""Streams that are computed side by side afterwards."""
SETTINGS = {
    "engine.max_streams": SLOTS,
    "engine.max_batch_size": MAX_BATCH,
    "limits.hibernate_after_s": 0.2,
    "transport.heartbeat_s": 0.5,
}


@pytest.mark.heavy
@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NETWORKS)
async def test_each_stream_has_the_bits_that_it_has_alone(tmp_path: Path, name: str, count: int) -> None:
    case, ready = NETWORKS[name], prepared(NETWORKS[name].model())
    spec, description, rng = ready.network.state, ready.model.description, np.random.default_rng(count)
    visitors = make_visitors(
        rng, spec, description.features, description.outputs, count, any_state=case.steps is not None
    )
    copies = await served(tmp_path, ready, visitors, rng)
    check_verdicts(ready, tmp_path / "recording.instep", [*visitors, *copies])
    originals = {f"copy of {visitor.name}": visitor for visitor in visitors}
    for copy in copies:
        assert_equal(copy.y, originals[copy.name].y[-len(copy.y) :], copy)
    for visitor in (*visitors, *copies):
        if visitor.closed is not None:
            assert visitor.final is not None
            assert visitor.closed.tobytes() == visitor.final.tobytes(), visitor.name
    for visitor in visitors:
        y, final = step_frames(ready.network, visitor.x[:, None], visitor.initial[None])
        assert visitor.final is not None
        assert_equal(visitor.y, y[:, 0], visitor)
        assert visitor.final.tobytes() == final[0].tobytes(), visitor.name
    visitors.sort(key=lambda visitor: -len(visitor.x))
    for first in range(0, count, AT_ONCE_HERE):
        batch = visitors[first : first + AT_ONCE_HERE]
        check_definition(ready, batch)
        if case.steps is not None:
            check_steps(ready, case.steps(ready), batch)
        check_sequences(ready, None if case.sequence is None else case.sequence(ready), batch)


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
                assert (client.info.exactness, client.info.arithmetic) == ("exact", "portable-1")
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
    assert inspect(victim.recording).frames == frames + sum(len(copy.x) for _, copy in copies)
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


def check_verdicts(ready: Prepared, recording: Path, visitors: Sequence[Visitor]) -> None:
    """Verify the recording, bit for bit."""
    with RecordingReader(recording) as reader:
        report = verify(reader, ready.model, [], ignore_progress)
    assert {stream.name for stream in report.streams} == {visitor.name for visitor in visitors}
    assert (report.mismatches, report.verdict, report.verified) == (0, "exact", True), report.streams


def check_definition(ready: Prepared, batch: Sequence[Visitor]) -> None:
    """Compare with the definition, bit for bit; the longest stream is the first."""
    definition, spec = ready.network.definition(), ready.network.state
    assert definition is not None
    x, rows = side_by_side(ready, batch)
    active = np.array([sum(len(visitor.x) > at for visitor in batch) for at in range(len(x))])
    y, after = definition.run(x, spec.unpack(rows), active)
    for row, (visitor, final) in enumerate(zip(batch, spec.pack(after), strict=True)):
        assert visitor.final is not None
        assert_equal(visitor.y, y[: len(visitor.x), row], visitor)
        assert visitor.final.tobytes() == final.tobytes(), visitor.name


def check_steps(ready: Prepared, run: Run, batch: Sequence[Visitor]) -> None:
    """Compare with frames that are computed one after another, without the engine."""
    x, rows = side_by_side(ready, batch)
    y = []
    for at, frames in enumerate(x):
        outputs, rows = run(frames[None], rows)
        y.append(outputs[0])
        for row, visitor in enumerate(batch):
            if at + 1 == len(visitor.x) and not visitor.is_hostile:
                assert visitor.final is not None
                assert_close(visitor.y, np.stack(y)[:, row], visitor)
                found, expected = (ready.network.state.unpack(each[None]) for each in (visitor.final, rows[row]))
                for name, leaf in found.items():
                    assert_close(leaf, expected[name], visitor)


def check_sequences(ready: Prepared, truth: Run | None, batch: Sequence[Visitor]) -> None:
    """Compare with whole sequences in one call, by the network's own module and by torch, where there is one."""
    x, rows = side_by_side(ready, batch)
    for sequences in (ready.network.sequence(x, rows), truth and truth(x, rows)):
        for row, visitor in enumerate(batch if sequences is not None else ()):
            if not visitor.is_hostile:
                assert sequences is not None
                assert_close(visitor.y, sequences[0][: len(visitor.x), row], visitor)


def side_by_side(ready: Prepared, batch: Sequence[Visitor]) -> tuple[F32, U8]:
    """Frames [T, R, features] and initial states of streams, filled up with zeros to the longest."""
    x = np.zeros((max(len(each.x) for each in batch), len(batch), batch[0].x.shape[1]), np.float32)
    for row, visitor in enumerate(batch):
        x[: len(visitor.x), row] = visitor.x
    return x, np.stack([visitor.initial for visitor in batch])


def assert_equal(found: F32, expected: F32, visitor: Visitor) -> None:
    assert found.shape == expected.shape, visitor.name
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32), err_msg=visitor.name)


def assert_close(found: F32, expected: F32, visitor: Visitor) -> None:
    largest = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * largest, err_msg=visitor.name)
