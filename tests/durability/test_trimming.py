"""A history is trimmed while it is written: after a kill or a power loss at any point, what is left fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32
from instep.recording.database import DatabaseLimits
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep_client import AsyncClient, AsyncStream
from tests.support.disk import Disk, Operation, after_power_loss, lay_out, written
from tests.support.models import SMALL, whole
from tests.support.running import running
from tests.support.story import Story, assert_restored, new_engine, story_header
from tests.support.stretches import stretches_of

pytestmark = pytest.mark.heavy

ROUNDS = 90
KILLS, LOSSES = 60, 40
KEPT = Retention(keep_ns=120_000)
"""The story's clock ticks 1,000 ns for each thing that happens."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Operation], int, Story]]:
    """All that reached the disk while a story was told and trimmed, how much of it made the file, and the truth."""
    disk = Disk("trimming")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("instep.recording.writer.sqlite3", disk)
        path = tmp_path_factory.mktemp("trimming") / "r.instep"
        limits = DatabaseLimits(wal_bytes=300_000, deleted_at_once=5)
        writer = RecordingWriter.create(path, story_header("fsync"), KEPT, limits)
        began = len(disk.operations)
        story = Story(writer, seed=5, trims=True)
        for _ in range(ROUNDS):
            story.tell(1)
            disk.mark(writer.position)
            writer.copy_wal()
        assert writer.trimmed.position > writer.position / 2
        writer.abandon()
    yield disk.operations, began, story
    disk.close()


def check(path: Path, story: Story) -> int:
    """Hold what is left against the truth, and then an engine that goes on with it: where the history begins."""
    inspect(path)
    with RecordingReader(path) as reader:
        position, first = reader.last_position, reader.first_position
        streams = reader.streams()
    truth = story.truth(position)
    stretches = stretches_of(path)
    for info in streams:
        if info.closed_position is not None:
            continue
        x, y = list[F32](), list[F32]()
        for stretch in stretches:
            if stretch.stream == info.stream:
                x.append(stretch.x)
                y.append(stretch.y)
                initial = stretch.initial_state
                state = np.zeros((1, 8), np.float32) if initial is None else initial.view("<f4").reshape(1, 8)
                if len(y[-1]):
                    np.testing.assert_array_equal(whole(SMALL, x[-1][: len(y[-1])], state)[0], y[-1])
        begin = info.first_seq - truth[info.name].first_seq
        assert begin >= 0
        np.testing.assert_array_equal(np.concatenate(x), truth[info.name].x[begin:])
    assert {info.name for info in streams if info.closed_position is None} == truth.keys()
    engine = new_engine()
    writer, recovery = engine.resume(path, story_header("fsync"))
    assert_restored(engine, truth)
    assert recovery.last_stream == max(number for number, at in [(0, 0), *story.opened.items()] if at <= position)
    while writer.trim(0):
        pass  # what a crash left of a history that was being deleted
    writer.close()
    inspect(path)
    return first


def test_a_process_that_was_killed_at_any_point(trace: tuple[list[Operation], int, Story], tmp_path: Path) -> None:
    operations, began, story = trace
    rng = np.random.default_rng(1)
    crashes = sorted(rng.choice(np.arange(began, len(operations) + 1), KILLS, replace=False).tolist())
    firsts = [check(lay_out(tmp_path / str(crash), written(operations[:crash])), story) for crash in crashes]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) > 4, "the history was trimmed too seldom to show anything"


def test_a_machine_that_lost_power_at_any_point(trace: tuple[list[Operation], int, Story], tmp_path: Path) -> None:
    operations, began, story = trace
    rng = np.random.default_rng(2)
    for number in range(LOSSES):
        crash = int(rng.integers(began, len(operations) + 1))
        path = lay_out(tmp_path / str(number), after_power_loss(operations[:crash], rng))
        reported = max((op.offset for op in operations[:crash] if op.verb == "mark"), default=0)
        with RecordingReader(path) as reader:
            assert reader.last_position >= reported
        check(path, story)


@pytest.mark.long
@pytest.mark.parametrize("limit", [{"keep_bytes": 700_000}, {"keep_s": 0.05}], ids=str)
async def test_streams_go_on_exactly_while_and_after_their_history_is_trimmed(
    rng: np.random.Generator, tmp_path: Path, limit: dict[str, float]
) -> None:
    path, told, names = tmp_path / "r.instep", list[dict[str, Any]](), ("busy", "idle")
    x: dict[str, list[F32]] = {name: [] for name in names}
    y: dict[str, list[F32]] = {name: [] for name in names}

    async def step(name: str, stream: AsyncStream) -> None:
        x[name].append(rng.standard_normal((128, 5)).astype(np.float32))
        y[name].append(await stream.step(x[name][-1]))

    def trimmed() -> list[int]:
        return [each["position"] for each in told if each["event"] == "recording trimmed"]

    async with (
        running(SMALL, told=told, recording={"path": path, **limit}) as server,
        AsyncClient(server.endpoint) as client,
    ):
        busy, idle = [await client.open(name) for name in names]
        await step("idle", idle)
        while len(trimmed()) < 3:
            await step("busy", busy)
        epochs = {"busy": busy.epoch, "idle": idle.epoch}
        await client.close(park=True)
    with RecordingReader(path) as reader:
        assert reader.first_position == trimmed()[-1] + 1
    async with running(SMALL, recording={"path": path}) as server, AsyncClient(server.endpoint) as client:
        for name in names:
            await step(name, await client.resume(name, 128 * len(x[name]), epochs[name]))
            np.testing.assert_array_equal(np.concatenate(y[name]), whole(SMALL, np.concatenate(x[name]))[0])
