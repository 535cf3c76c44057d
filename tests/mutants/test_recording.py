"""The recording's rules, broken one by one: its tests notice each."""

from __future__ import annotations

import gc
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from instep.recording.errors import DamagedRecording
from instep.recording.inspection import inspect
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.records import refuse_other_model
from instep.recording.schema import RecordingHeader, sound_rows
from instep.recording.writer import RecordingWriter, set_up
from tests.recording import test_commands, test_records, test_resume, test_writer
from tests.support.broken_rules import BrokenRule, check_is_found
from tests.support.disk import Disk
from tests.support.forger import Forger
from tests.support.story import Story, story_header

_NUMBERS = count()

pytestmark = [
    pytest.mark.long,
    # Scenarios fail before they close their recordings.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def a_lock_of_its_own(original: Any, lock: WriterLock, path: Path) -> None:
    original(lock, path.with_name(f"{path.name}.{next(_NUMBERS)}"))


def without_fsync(original: Any, database: sqlite3.Connection, header: RecordingHeader, *limits: Any) -> None:
    original(database, replace(header, durability="commit"), *limits)


def a_missing_batch_is_damage(tmp_path: Path) -> None:
    test_commands.record(tmp_path / "a.rec")
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec")
    batch, _ = forger.find_frame(2, 1)
    forger.remove("batches", batch["position"])
    with pytest.raises(DamagedRecording, match=f"the row at position {batch['position']} is missing"):
        inspect(forger.path)


def fsync_syncs_the_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(str(tmp_path))
    monkeypatch.setattr("instep.recording.writer.sqlite3", disk)
    writer = RecordingWriter.create(tmp_path / "a.rec", story_header("fsync"))
    Story(writer, seed=1).tell(5)
    writer.abandon()
    monkeypatch.undo()
    disk.close()
    assert sum(each.verb == "sync" and each.file == "-wal" for each in disk.operations) >= 5, "once a commit"


RULES = (
    BrokenRule(
        "a row that does not match its checksum is read",
        sound_rows,
        lambda original, table, rows: len(rows),
        [test_commands.test_repair_names_the_new_file_and_what_was_left_out],
    ),
    BrokenRule(
        "a row that is missing is passed over",
        RecordingReader.check_positions,
        lambda original, file, first=1: None,
        [a_missing_batch_is_damage],
    ),
    BrokenRule(
        "a commit writes nothing",
        RecordingWriter.commit,
        lambda original, writer: None,
        [test_writer.test_what_is_not_committed_is_not_there],
    ),
    BrokenRule("fsync does not wait for the disk", set_up, without_fsync, [fsync_syncs_the_wal]),
    BrokenRule(
        "two engines write one recording",
        WriterLock.__init__,
        a_lock_of_its_own,
        [test_resume.test_there_is_one_writer_at_a_time],
    ),
    BrokenRule(
        "an engine continues the recording of another model",
        refuse_other_model,
        lambda original, *arguments: None,
        [test_records.test_only_another_model_is_refused],
    ),
)


def test_the_scenarios_pass_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_missing_batch_is_damage(tmp_path)
    (tmp_path / "a.rec").unlink()
    fsync_syncs_the_wal(tmp_path, monkeypatch)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
