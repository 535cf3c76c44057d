"""A recording is cut short or a byte of it changes: a restart is exact, or it is refused and says where."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.schema import PAGE_BYTES
from instep.recording.writer import RecordingWriter
from tests.support.disk import lay_out
from tests.support.story import Story, assert_restored, new_engine, story_header

pytestmark = pytest.mark.heavy

PLACES = 260
"""In each of two recordings."""
WAL_PLACES = 100
PLACE = re.compile(
    r"stepping the batch at position "
    r"|is damaged: (it ends after|the rows? (at|after|of) |the table |up to position |the header "
    r"|its newest checkpoint )"
    r"|is not a recording(, or is damaged)?: |cannot continue the recording .*: database disk image is malformed"
)


@dataclass(frozen=True)
class Recorded:
    """The files that a killed engine left, and the truth about them."""

    files: dict[str, bytes]
    last: int
    story: Story


def record(folder: Path, rounds: int, *, checkpoint: bool, snapshots: bool = True) -> Recorded:
    writer = RecordingWriter.create(folder / "r.instep", story_header())
    story = Story(writer, seed=3, snapshots=snapshots)
    story.tell(rounds)
    if checkpoint:
        with closing(sqlite3.connect(folder / "r.instep")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    names = ("", "-wal")
    files = {name: (folder / f"r.instep{name}").read_bytes() for name in names if (folder / f"r.instep{name}").exists()}
    writer.abandon()
    return Recorded({name: contents for name, contents in files.items() if contents}, writer.position, story)


@pytest.fixture(scope="module", params=[True, False], ids=["snapshots", "no snapshots"])
def in_one_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Nothing is in the WAL any more; without snapshots a restart needs every row."""
    return record(tmp_path_factory.mktemp("one"), 30, checkpoint=True, snapshots=request.param)


@pytest.fixture(scope="module")
def in_the_wal(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Nothing is in the file yet but the empty tables."""
    return record(tmp_path_factory.mktemp("wal"), 12, checkpoint=False)


def restart(folder: Path, files: dict[str, bytes], recorded: Recorded) -> int | str:
    """Restart on these files: the position up to which the engine is exactly as it was, or why it was refused."""
    path = lay_out(folder, files)
    engine = new_engine()
    try:
        with RecordingReader(path) as reader:
            position = reader.last_position
        writer, _ = engine.resume(path, story_header())
    except RecordingError as error:
        return str(error)
    writer.abandon()
    assert position in (0, *recorded.story.durable)
    assert_restored(engine, recorded.story.truth(position))
    return position


def changed(contents: bytes, at: int, to: int) -> bytes:
    return contents[:at] + bytes([to]) + contents[at + 1 :]


Damage = Callable[[bytes, np.random.Generator], bytes]


def one_byte(contents: bytes, rng: np.random.Generator) -> bytes:
    """A byte becomes another: anywhere, where something is, or where pages begin, which SQLite goes by."""
    at = int(rng.integers(len(contents)))
    match rng.integers(4):
        case 0:
            at = min(at // PAGE_BYTES * PAGE_BYTES + int(rng.integers(120)), len(contents) - 1)
        case 1 | 2:
            at = int(rng.choice(np.flatnonzero(np.frombuffer(contents, np.uint8))))
    return changed(contents, at, contents[at] ^ int(rng.integers(1, 256)))


def cut(contents: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing, often a number of whole pages."""
    length = int(rng.integers(len(contents)))
    return contents[: length // PAGE_BYTES * PAGE_BYTES if rng.random() < 0.3 else length]


@pytest.mark.parametrize(("damage", "share"), [(one_byte, 0.8), (cut, 0.2)], ids=["one byte", "cut"])
def test_a_damaged_recording_goes_on_exactly_or_is_refused_with_the_place(
    in_one_file: Recorded, tmp_path: Path, damage: Damage, share: float
) -> None:
    rng = np.random.default_rng(4)
    found: Counter[str] = Counter()
    for number in range(round(share * PLACES)):
        contents = damage(in_one_file.files[""], rng)
        outcome = restart(tmp_path / str(number), {"": contents}, in_one_file)
        if isinstance(outcome, str):
            assert "/r.instep " in outcome or "/r.instep:" in outcome, outcome
            assert PLACE.search(outcome), outcome
            found["refused"] += 1
        else:
            assert outcome == in_one_file.last, f"rows were lost without a word by damage {number}"
            found["exact"] += 1
    assert found["refused"] > 20


@pytest.mark.parametrize("damage", [one_byte, cut], ids=["one byte", "cut"])
def test_of_a_damaged_wal_what_was_committed_before_the_place_counts(
    in_the_wal: Recorded, tmp_path: Path, damage: Damage
) -> None:
    rng = np.random.default_rng(5)
    reached = set()
    for number in range(WAL_PLACES):
        files = {**in_the_wal.files, "-wal": damage(in_the_wal.files["-wal"], rng)}
        outcome = restart(tmp_path / str(number), files, in_the_wal)
        assert isinstance(outcome, int), outcome
        reached.add(outcome)
    assert len(reached) > 5


def test_undamaged_both_go_on_to_their_last_row(in_one_file: Recorded, in_the_wal: Recorded, tmp_path: Path) -> None:
    for name, recorded in (("one", in_one_file), ("wal", in_the_wal)):
        assert restart(tmp_path / name, recorded.files, recorded) == recorded.last
