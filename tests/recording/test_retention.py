"""Which files are kept, and that nothing else is removed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from instep.recording import family
from instep.recording.recorder import Recorder
from instep.recording.retention import Retention, Sealed, surplus
from instep.recording.writer import RecordingWriter
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.scribe import START_NS, Scribe

GRU = make_gru(3, 4)
HEADER = make_header(gru_description(GRU))


@pytest.mark.parametrize(
    ("keep_bytes", "keep_ns", "expected"),
    [
        (0, 0, 0),
        (1000, 0, 0),
        (60, 0, 0),
        (59, 0, 1),
        (50, 0, 1),
        (49, 0, 2),
        (29, 0, 3),
        (1, 0, 3),
        (0, 50, 0),
        (0, 49, 1),
        (0, 30, 2),
        (0, 1, 3),
        (59, 30, 2),
        (29, 30, 3),
    ],
)
def test_the_oldest_beyond_either_limit_are_surplus(keep_bytes: int, keep_ns: int, expected: int) -> None:
    files = [Sealed(Path("a"), 10, 50), Sealed(Path("b"), 20, 69), Sealed(Path("c"), 30, 98)]
    assert surplus(files, keep_bytes, keep_ns, now_ns=100) == expected


def test_no_file_is_left_between_others_that_are_gone() -> None:
    """A clock that was set back makes an older file look younger."""
    files = [Sealed(Path("a"), 10, 90), Sealed(Path("b"), 10, 10)]
    assert surplus(files, 0, 50, now_ns=100) == 2


def rotated(path: Path, times: int) -> Scribe:
    scribe = Scribe(RecordingWriter.create(path, HEADER), gru_step(GRU))
    scribe.open(1)
    for _ in range(times):
        scribe.step([1])
        scribe.rotate()
    return scribe


class Told:
    def __init__(self) -> None:
        self.removed: list[tuple[str, int]] = []
        self.kept: list[str] = []

    def retention(self, path: Path, keep_bytes: int, keep_ns: int, now_ns: int) -> Retention:
        return Retention(
            family.members(path),
            keep_bytes,
            keep_ns,
            lambda: now_ns,
            lambda file, size: self.removed.append((file.name, size)),
            lambda file, error: self.kept.append(file.name),
        )


def test_the_live_file_and_files_of_others_stay_whatever_is_kept(tmp_path: Path) -> None:
    path, told = tmp_path / "r.rec", Told()
    rotated(path, 2).writer.close()
    other = tmp_path / "r-20261124.rec"
    rotated(other, 0).writer.close()
    size = path.stat().st_size
    told.retention(path, 1, 0, START_NS).run()
    assert [name for name, _ in told.removed] == ["r.rec", "r-000002.rec"]
    assert told.removed[0][1] == size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r-000003.rec", "r-20261124.rec"]
    told.retention(path, 1, 1, START_NS * 2).run()
    assert len(told.removed) == 2


def test_a_file_is_as_old_as_the_one_that_follows_it(tmp_path: Path) -> None:
    path, told = tmp_path / "r.rec", Told()
    rotated(path, 3).writer.close()
    first, second = (member.header.created_ns for member in family.members(path)[1:3])
    told.retention(path, 0, 10**9, first + 10**9).run()
    assert told.removed == []
    told.retention(path, 0, 10**9, second + 10**9).run()
    assert [name for name, _ in told.removed] == ["r.rec"]


def test_what_cannot_be_removed_is_said_and_keeps_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "r.rec", Told()
    rotated(path, 2).writer.close()
    retention = told.retention(path, 1, 0, START_NS)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "no")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        retention.run()
    assert (told.kept, told.removed) == (["r.rec"], [])
    assert len(family.members(path)) == 3
    retention.run()
    assert [name for name, _ in told.removed] == ["r.rec", "r-000002.rec"]


def test_a_recorder_removes_at_its_start_and_after_each_rotation(tmp_path: Path) -> None:
    path, told = tmp_path / "r.rec", Told()
    rotated(path, 1).writer.close()
    writer = RecordingWriter.resume(path, HEADER)
    scribe = Scribe(writer, gru_step(GRU))
    writer.commit()
    retention = told.retention(path, 1, 0, START_NS)
    recorder = Recorder(writer, 4, lambda: None, lambda error: None, lambda ticket: None, retention)
    recorder.stop()
    assert [name for name, _ in told.removed] == ["r.rec"], "nothing was recorded"
    writer = RecordingWriter.resume(path, HEADER)
    retention = told.retention(path, 1, 0, START_NS)
    recorder = Recorder(writer, 4, lambda: None, lambda error: None, lambda ticket: None, retention)
    recorder.rotate(START_NS, scribe.carried())
    recorder.rotate(START_NS, scribe.carried())
    recorder.stop()
    assert recorder.failed is None
    assert [name for name, _ in told.removed] == ["r.rec", "r-000002.rec", "r-000003.rec"]
    assert [member.path.name for member in family.members(path)] == ["r-000004.rec"]


def sealed_with_a_wal(path: Path) -> None:
    """Two files, the first of which somebody had open as it was sealed; its writer was killed."""
    scribe = rotated(path, 0)
    scribe.step([1])
    scribe.writer.commit()
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM batches").fetchall()
    scribe.step([1])
    scribe.rotate()
    scribe.writer.abandon()
    reader.close()


def test_the_wal_of_a_file_counts_and_goes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "r.rec", Told()
    sealed_with_a_wal(path)
    wal = tmp_path / "r.rec-wal"
    both = path.stat().st_size + wal.stat().st_size
    assert wal.stat().st_size
    told.retention(path, both, 0, START_NS).run()
    assert told.removed == []
    unlink, gone = Path.unlink, list[str]()

    def die_after_the_first(self: Path, missing_ok: bool = False) -> None:
        if gone:
            raise KeyboardInterrupt
        gone.append(self.name)
        unlink(self, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", die_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            told.retention(path, both - 1, 0, START_NS).run()
    assert gone == ["r.rec"], "what is left is a file without its WAL"
    others = [tmp_path / "r-000009.rec-wal", tmp_path / "r.recorder-wal", tmp_path / "other.rec-wal"]
    for other in others:
        other.write_bytes(b"mine")
    RecordingWriter.resume(path, HEADER).close()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "r-000002.rec", *others])
    sealed = tmp_path / "s.rec"
    sealed_with_a_wal(sealed)
    both = sealed.stat().st_size + Path(f"{sealed}-wal").stat().st_size
    told.retention(sealed, both - 1, 0, START_NS).run()
    assert told.removed == [("s.rec", both)]
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("s.")) == []
