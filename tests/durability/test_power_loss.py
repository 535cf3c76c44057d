"""The machine loses power: what was reported durable at `fsync` is there, and at `commit` what is lost is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from instep.core.ownership import check_resume
from instep.core.streams import StreamTable
from instep.recording.database import DatabaseLimits
from instep.recording.reader import RecordingReader
from instep.recording.schema import Durability
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import Code
from tests.support.disk import Disk, Operation, after_power_loss, lay_out
from tests.support.story import WINDOW, Story, Truth, assert_restored, new_engine, story_header

pytestmark = pytest.mark.heavy

ROUNDS = 60
CRASHES = 120
WAL_BYTES = 400_000
"""So that the WAL is copied into the file, and begun again, several times."""


@dataclass(frozen=True)
class Trace:
    """All that reached the disk while a story was written, and the truth about it."""

    operations: list[Operation]
    began: int
    """How many operations made the empty recording."""
    story: Story

    def reported(self, crash: int) -> int:
        """The newest position that was called durable before the crash."""
        return max((op.offset for op in self.operations[:crash] if op.verb == "mark"), default=0)


@pytest.fixture(scope="module", params=["fsync", "commit"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Trace]]:
    durability: Durability = request.param
    disk = Disk(f"power-{durability}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("instep.recording.writer.sqlite3", disk)
        path = tmp_path_factory.mktemp(durability) / "r.instep"
        writer = RecordingWriter.create(path, story_header(durability), limits=DatabaseLimits(wal_bytes=WAL_BYTES))
        began = len(disk.operations)
        story = Story(writer, seed=1)
        for _ in range(ROUNDS):
            story.tell(1)
            disk.mark(writer.position)
            writer.copy_wal()
        writer.close()
        disk.mark(writer.position)
    yield durability, Trace(disk.operations, began, story)
    disk.close()


def restore(path: Path, durability: Durability, story: Story) -> tuple[int, StreamTable]:
    """Go on with what a crash left, and hold the engine against the truth: the last position that counts."""
    with RecordingReader(path) as reader:
        position = reader.last_position
    engine = new_engine()
    writer, _ = engine.resume(path, story_header(durability))
    writer.abandon()
    assert_restored(engine, story.truth(position))
    return position, engine.table


def test_the_trace_holds_what_a_disk_sees(trace: tuple[str, Trace]) -> None:
    durability, recorded = trace
    later = recorded.operations[recorded.began :]
    verbs = Counter((operation.verb, operation.file) for operation in later)
    commits = verbs["mark", ""]
    assert commits == ROUNDS + 1
    assert verbs["write", "-wal"] > 5 * commits
    assert verbs["write", ""] > 20, "nothing was copied into the file"
    headers = sum(op.verb == "write" and op.file == "-wal" and op.offset == 0 for op in later)
    assert headers > 3, "the WAL was not begun again"
    if durability == "fsync":
        assert verbs["sync", "-wal"] >= commits
    else:
        assert verbs["sync", "-wal"] < commits / 2


def test_after_a_power_loss_nothing_reported_at_fsync_is_lost_and_at_commit_only_the_end_and_that_is_told(
    trace: tuple[Durability, Trace], tmp_path: Path
) -> None:
    durability, recorded = trace
    rng = np.random.default_rng(7)
    lost = told = 0
    for number in range(CRASHES):
        crash = int(rng.integers(recorded.began, len(recorded.operations) + 1))
        files = after_power_loss(recorded.operations[:crash], rng)
        path = lay_out(tmp_path / str(number), files)
        reported = recorded.reported(crash)
        position, table = restore(path, durability, recorded.story)
        if durability == "fsync":
            assert position >= reported, f"crash {number}, after operation {crash}"
        elif position < reported:
            lost += 1
            told += assert_told(table, recorded.story.truth(reported), recorded.story.truth(position))
    if durability == "commit":
        assert lost > CRASHES / 4, "the disk lost too little to show anything"
        assert told > lost


def assert_told(table: StreamTable, given: dict[str, Truth], left: dict[str, Truth]) -> int:
    """Every client with outputs of frames that are gone is told so; how many there are."""
    told = 0
    for name, had in given.items():
        decision = check_resume(
            table, WINDOW, (), [name], np.array([had.seq], np.uint64), np.array([had.epoch], np.uint64), False, 1
        )
        if name not in left:
            assert decision.codes[0] == Code.UNKNOWN_STREAM
        elif left[name].seq < had.seq:
            assert (decision.codes[0], decision.expected_seq[0]) == (Code.DATA_LOSS, left[name].seq)
            told += 1
        else:
            assert decision.codes[0] in (0, Code.DATA_LOSS)
    return told


def test_a_machine_that_loses_power_again_and_again_while_it_restarts_loses_nothing(
    trace: tuple[Durability, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durability, recorded = trace
    rng = np.random.default_rng(8)
    crash = len(recorded.operations) * 2 // 3
    path = lay_out(tmp_path / "first", after_power_loss(recorded.operations[:crash], rng))
    before, _ = restore(lay_out(tmp_path / "look", files_of(path)), durability, recorded.story)
    for number in range(10):
        with Mounted(f"again-{durability}-{number}", path, monkeypatch) as disk:
            engine = new_engine()
            writer, _ = engine.resume(path, story_header(durability))
            assert_restored(engine, recorded.story.truth(before))
            writer.abandon()
        at = int(rng.integers(disk.mounted, len(disk.operations) + 1))
        path = lay_out(tmp_path / str(number), after_power_loss(disk.operations[:at], rng))
    engine = new_engine()
    writer, _ = engine.resume(path, story_header(durability))
    writer.close()
    assert_restored(engine, recorded.story.truth(before))


def files_of(path: Path) -> dict[str, bytes]:
    files = {suffix: Path(f"{path}{suffix}") for suffix in ("", "-wal", "-journal")}
    return {suffix: file.read_bytes() for suffix, file in files.items() if file.exists()}


class Mounted(Disk):
    """A disk that holds a recording already."""

    def __init__(self, name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(name)
        for suffix, contents in files_of(path).items():
            self.operations.append(Operation("create", suffix))
            self.operations.append(Operation("write", suffix, 0, contents))
            self.operations.append(Operation("sync", suffix, is_lasting=True))
        self.mounted = len(self.operations)
        self._monkeypatch = monkeypatch

    def __enter__(self) -> Mounted:
        self._monkeypatch.setattr("instep.recording.writer.sqlite3", self)
        return self

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()
        self.close()
