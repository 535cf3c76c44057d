"""The disk is full, or fails: nothing is answered any more, the server ends and says why, a restart has it all."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.server.preparation import CannotServe
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.disk import Disk, Fault, Operation
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient, Reply
from tests.support.running import running
from tests.support.served import serving
from tests.support.story import Story, assert_restored, new_engine, story_header

F, H = 5, 8
STREAMS = 3
SAYS = {"full": "database or disk is full", "broken": "disk I/O error"}
NAMES = [f"s{number}" for number in range(STREAMS)]


@dataclass
class Given:
    """What a client has sent and been given."""

    x: list[F32] = field(default_factory=list)
    """Of each block float32 [T, streams, features]; the last one may be unanswered."""
    y: list[F32] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Of each stream, how many it has the outputs of."""
        return sum(len(y) for y in self.y)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(str(tmp_path))
    monkeypatch.setattr("instep.recording.writer.sqlite3", disk)
    yield disk
    disk.close()


async def stream_until_goodbye(client: RawClient, given: Given, has_failed: Callable[[int], bool]) -> Reply:
    """Send blocks, each when the one before is answered, until the server says goodbye.

    Args:
        client: who sends.
        given: what it has.
        has_failed: called with the number of each block before it is sent; after True it may not be answered.
    """
    rng = np.random.default_rng(3)
    opened = await client.open(*NAMES)
    given.epochs = opened.epochs()
    for block in range(1000):
        failed_before = has_failed(block)
        x = rng.standard_normal((2, STREAMS, F)).astype(np.float32)
        given.x.append(x)
        have = [given.frames] * STREAMS
        reply = await client.step(opened.handles(), have, x, have)
        if reply.kind is Kind.ERROR:  # sent between the fault and the end
            assert reply.code is Code.SHUTTING_DOWN
            reply = await client.receive()
            assert reply.kind is Kind.GOODBYE
        if reply.kind is Kind.GOODBYE:
            return reply
        assert reply.kind is Kind.STEPPED
        assert reply.failures() == []
        assert not failed_before, "a block was sent after the fault, and answered"
        given.y.append(reply.floats().reshape(2, STREAMS, H))
    raise AssertionError("the server never ended")


async def assert_goes_on(server: Server, given: Given) -> None:
    """Resume the streams with what was given, send the last block again and one more: all as in `nn.GRU`."""
    async with RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(NAMES, [given.frames] * STREAMS, given.epochs)
        assert resumed.codes() == []
        assert min(resumed.seqs()) >= given.frames
        unanswered = [given.x[-1]] if len(given.x) > len(given.y) else []
        for x in (*unanswered, np.ones((2, STREAMS, F), np.float32)):
            have = [given.frames] * STREAMS
            reply = await client.step(resumed.handles(), have, x, have)
            assert reply.failures() == []
            given.y.append(reply.floats().reshape(-1, STREAMS, H))
        x, y = np.concatenate([*given.x, x]), np.concatenate(given.y)
        for column in range(STREAMS):
            expected, _ = whole(SMALL, x[:, column])
            np.testing.assert_array_equal(y[:, column].view(np.uint32), expected.view(np.uint32))


CASES = {
    "no room for the WAL": ("commit", "full", "write", "-wal", True),
    "no room for a moment": ("fsync", "full", "write", "-wal", False),
    "a write of the WAL fails": ("commit", "broken", "write", "-wal", False),
    "a sync of the WAL fails": ("fsync", "broken", "sync", "-wal", False),
    "no room as the WAL is copied into the file": ("commit", "full", "write", "", True),
    "a sync of the file fails": ("commit", "broken", "sync", "", False),
}
"""Durability, fault, what it happens to, whether it stays."""


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("case", CASES)
async def test_after_a_fault_nothing_is_answered_and_a_restart_loses_nothing(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, case: str, nth: int
) -> None:
    durability, fault, verb, file, stays = CASES[case]
    armed, count, fired = False, 0, 0

    def on_operation(operation: Operation) -> Fault | None:
        nonlocal count, fired
        if not armed or (operation.verb, operation.file) != (verb, file):
            return None
        count += 1
        if count < nth or (count > nth and not stays):
            return None
        fired += 1
        return fault  # type: ignore[return-value]

    def has_failed(block: int) -> bool:
        nonlocal armed
        armed = block >= 10
        return fired > 0

    disk.on_operation = on_operation
    path = tmp_path / "r.instep"
    recording = {"path": path, "durability": durability, "recovery_target_s": 0.001}
    given = Given()
    failure = f"the recording {path} failed: {SAYS[fault]}"
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        goodbye = await stream_until_goodbye(client, given, has_failed)
        assert failure in goodbye.header[2]
        assert fired
        written = len(disk.operations)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.receive(), 0.05)
    assert given.frames >= 20
    assert [op for op in disk.operations[written:] if op.verb == "write"] == []
    monkeypatch.undo()
    async with running(SMALL, recording=recording) as server:
        await assert_goes_on(server, given)


@pytest.mark.parametrize(("durability", "fault"), [("commit", "broken"), ("commit", "full"), ("fsync", "broken")])
def test_a_disk_that_fails_while_a_recording_is_gone_on_with_is_said_and_costs_nothing(
    tmp_path: Path, disk: Disk, durability: str, fault: Fault
) -> None:
    path = tmp_path / "r.instep"
    writer = RecordingWriter.create(path, story_header())
    story = Story(writer, seed=2)
    story.tell(10)
    writer.abandon()
    header = story_header(durability)
    refused = 0
    for after in range(100):
        left = after

        def on_operation(operation: Operation) -> Fault | None:
            nonlocal left
            left -= operation.verb in ("write", "sync", "truncate")
            return fault if left < 0 else None

        disk.on_operation = on_operation
        engine = new_engine()
        try:
            last, _ = engine.resume(path, header)
        except RecordingError as error:
            says = f"cannot continue the recording {path}: .*{SAYS[fault]}" + "; make room" * (fault == "full")
            assert re.search(says, with_advice(error)), error  # noqa: PT017
            refused += 1
            continue
        last.abandon()
        break
    assert refused > 3
    assert_restored(engine, story.truth(writer.position))


# ── A real file system, a real process ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no room for another file."""
    with contextlib.suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))


async def test_a_full_tmpfs_ends_the_process_with_status_1_and_with_more_room_or_elsewhere_it_goes_on(
    tmp_path: Path, small_disk: Path
) -> None:
    write_model(tmp_path / "model", SMALL)
    path, given = small_disk / "r.instep", Given()
    with serving(tmp_path / "model", "--record", str(path)) as served:
        async with RawClient(served.until("serving")["endpoint"]) as client:
            await client.hello()
            await stream_until_goodbye(client, given, lambda block: False)
        lines = served.end()
        assert served.process.returncode == 1
    failed = [line["reason"] for line in lines if line["event"] == "failed"]
    assert failed == [f"the recording {path} failed: database or disk is full"]
    assert given.frames > 10
    (stopped,) = (line for line in lines if line["event"] == "stopped")
    computed, answered = stopped["frames"] // (2 * STREAMS), len(given.y)
    # The last block may have been refused, or have come when the server read nothing any more.
    assert computed - answered <= stopped["messages_unanswered"] <= len(given.x) - answered
    fill(small_disk)  # what was not committed last may have left more room than the next start needs
    with pytest.raises(CannotServe, match="No space left on device; make room, or copy the recording and its -wal"):
        async with running(SMALL, recording={"path": path}):
            pass
    for file in (path, path.with_name("r.instep-wal")):
        shutil.copy(file, tmp_path)
    async with running(SMALL, recording={"path": tmp_path / path.name}) as server:
        await assert_goes_on(server, copy.deepcopy(given))
    remount = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=64m", str(small_disk))
    assert await remount.wait() == 0
    async with running(SMALL, recording={"path": path}) as server:
        await assert_goes_on(server, given)
