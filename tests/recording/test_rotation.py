"""A recording goes on in another file, that can be read, checked, exported and gone on with alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.recording import family
from instep.recording.errors import RecordingError
from instep.recording.inspection import how_it_ends, inspect
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recovery import read_recovery
from instep.recording.repair import repair
from instep.recording.sequences import SequenceIndex, all_frames
from instep.recording.writer import RecordingWriter
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.rows import stream_event
from tests.support.scribe import START_NS, Scribe

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))


def begun(path: Path) -> Scribe:
    """Three streams with frames; the second has closed, the third has begun at frame 7 with a state and none."""
    scribe = Scribe(RecordingWriter.create(path, HEADER), gru_step(GRU))
    for stream in (1, 2):
        scribe.open(stream)
    scribe.step([1, 2])
    scribe.step([2, 1])
    scribe.close(2)
    scribe.open(3, scribe.random_state(), first_seq=7)
    return scribe


def rows(path: Path, query: str) -> list[Any]:
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def test_plain_sql_reads_what_a_following_file_begins_with(tmp_path: Path) -> None:
    path, following = tmp_path / "r.rec", tmp_path / "r-000002.rec"
    scribe = begun(path)
    states = dict(scribe.states)
    last = scribe.writer.position
    scribe.rotate()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("r-000002.rec", "r-000002.rec-shm", "r-000002.rec-wal", "r.rec", "r.rec-lock")
    ]
    assert rows(path, "SELECT position, kind, detail FROM events")[-1] == (last + 1, "rotated", "r-000002.rec")
    header: dict[object, object] = dict(rows(following, "SELECT key, value FROM header"))
    assert (header["number"], header["first_position"]) == ("2", str(last + 2))
    assert (header["begun_ns"], header["last_stream"], header["last_epoch"]) == (str(START_NS), "3", "1003")
    openings = "SELECT position, stream, name, epoch, first_seq, initial_state FROM openings"
    assert rows(following, openings) == [
        (last + 2, 1, "stream-1", 1001, 2, states[1].tobytes()),
        (last + 3, 3, "stream-3", 1003, 7, states[3].tobytes()),
    ]
    assert rows(following, "SELECT position, stream, seq, kind, detail FROM events") == [
        (last + 4, 1, 0, "carried", "held 0, goes on at 0"),
        (last + 5, 3, 7, "carried", "held 0, goes on at 7"),
        (last + 6, None, last + 5, "snapshot", "2 states"),
    ]
    assert rows(following, "SELECT stream, position, seq, state, tail_seq FROM states") == [
        (1, last + 5, 2, states[1].tobytes(), 0),
        (3, last + 5, 7, states[3].tobytes(), 7),
    ]
    assert rows(following, "SELECT position, openings, closings, events, states FROM snapshot") == [
        (last + 5, 2, 0, 2, 2)
    ]
    assert scribe.writer.position == last + 6
    scribe.writer.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r-000002.rec", "r.rec"]


def test_a_file_in_the_middle_is_whole_by_itself(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    for _ in range(3):
        scribe.rotate()
        scribe.step([3, 1])
    scribe.reset(1, scribe.random_state())
    scribe.close(1)
    scribe.open(4)
    scribe.writer.commit()
    path = scribe.writer.path
    assert path.name == "r-000004.rec"
    assert is_being_written(tmp_path / "r.rec")
    found = inspect(path, lambda _: None)
    assert (found.streams, found.open_streams, found.frames, found.ending) == (3, 2, 2, "being written")
    scribe.writer.close()
    (tmp_path / "r.rec").unlink()
    for number, ending in (2, "goes on in r-000003.rec"), (3, "goes on in r-000004.rec"), (4, "closed in order"):
        found = inspect(family.member_path(tmp_path / "r.rec", number), lambda _: None)
        assert found.ending == ending
        assert found.restarts == 0
    with RecordingReader(tmp_path / "r-000003.rec") as reader:
        index = SequenceIndex(reader, lambda _: None, all_frames)
        assert [(info.stream, info.first_seq) for info in index.streams] == [(1, 3), (3, 8)]
        sequences = index.sequences(index.kept)
        for at, stream in enumerate((1, 3)):
            seq = index.streams[at].first_seq
            np.testing.assert_array_equal(sequences.y[sequences.places(at)], [scribe.y[stream][seq]])


def test_recovery_reads_the_newest_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.rec"
    scribe = begun(path)
    scribe.rotate(tail=2)
    stream_event(scribe.writer, scribe.now, "owner", 3, 2000, "held 1003, goes on at 7")
    scribe.step([1])
    scribe.writer.commit()
    scribe.writer.abandon()
    path.unlink()
    with read_recovery(tmp_path / "r-000002.rec", lambda _: None) as recovered:
        replayed = [
            item.position if not hasattr(item, "batch") else item.batch.seqs.tolist() for item in recovered.replay()
        ]
    assert replayed == [[2]]
    one, three = recovered.streams
    assert (one.name, one.epoch, one.former_epoch, one.granted_seq, one.first_seq, one.seq) == (
        "stream-1",
        1001,
        0,
        0,
        0,
        2,
    )
    assert (three.epoch, three.former_epoch, three.granted_seq, three.first_seq, three.seq) == (2000, 1003, 7, 7, 7)
    assert one.tail_seq == 0
    np.testing.assert_array_equal(one.tail_y, [scribe.y[1][0], scribe.y[1][1]])
    assert (recovered.last_stream, recovered.last_epoch) == (3, 2000)


def test_numbers_of_streams_that_closed_in_an_older_file_are_not_given_again(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    scribe.close(3)
    scribe.rotate()
    scribe.writer.close()
    with read_recovery(tmp_path / "r-000002.rec", lambda _: None) as recovered:
        assert (recovered.last_stream, recovered.last_epoch) == (3, 1003)
        assert [stream.stream for stream in recovered.streams] == [1]


def test_a_file_without_open_streams_is_followed_too(tmp_path: Path) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "r.rec", HEADER), gru_step(GRU))
    scribe.rotate()
    scribe.rotate()
    scribe.open(1)
    scribe.step([1])
    scribe.writer.close()
    assert inspect(tmp_path / "r-000002.rec", lambda _: None).streams == 0
    assert inspect(tmp_path / "r-000003.rec", lambda _: None).frames == 1


@pytest.mark.parametrize("base_is_there", [True, False])
def test_the_newest_file_is_gone_on_with_under_the_name_of_the_first(tmp_path: Path, base_is_there: bool) -> None:
    path = tmp_path / "r.rec"
    scribe = begun(path)
    scribe.rotate()
    scribe.step([1])
    scribe.writer.close()
    if not base_is_there:
        path.unlink()
    scribe.writer = RecordingWriter.resume(path, HEADER)
    assert scribe.writer.path.name == "r-000002.rec"
    assert is_being_written(path)
    with pytest.raises(RecordingError, match="is being written by another instep"):
        RecordingWriter.resume(path, HEADER)
    scribe.step([1])
    scribe.rotate()
    scribe.writer.close()
    with RecordingReader(tmp_path / "r-000003.rec") as reader:
        assert (reader.header.number, reader.header.family) == (3, START_NS)
        assert [(info.stream, info.first_seq) for info in reader.streams()] == [(1, 4), (3, 7)]


def test_a_part_of_a_recording_is_not_gone_on_with_as_if_it_were_one_but_a_copy_is(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    scribe.rotate()
    scribe.writer.close()
    part, copy = tmp_path / "r-000002.rec", tmp_path / "copy.rec"
    with pytest.raises(RecordingError, match=rf"is file 2 of the recording {tmp_path}/r\.rec; name that"):
        RecordingWriter.resume(part, HEADER)
    copy.write_bytes(part.read_bytes())
    scribe.writer = RecordingWriter.resume(copy, HEADER)
    scribe.step([1])
    scribe.rotate()
    scribe.writer.close()
    assert [member.path.name for member in family.members(copy)] == ["copy.rec", "copy-000003.rec"]


def test_files_of_other_recordings_that_are_called_alike_are_left_alone_or_said(tmp_path: Path) -> None:
    for name in ("r-20261124.rec", "r-abc.rec", "r-1.rec", "rest-000002.rec"):
        begun(tmp_path / name).writer.close()
    begun(tmp_path / "r.rec").writer.close()
    assert [member.path.name for member in family.members(tmp_path / "r.rec")] == ["r.rec"]
    other = Scribe(
        RecordingWriter.create(tmp_path / "s.rec", make_header(gru_description(GRU), created_ns=5)), gru_step(GRU)
    )
    other.rotate()
    other.writer.close()
    (tmp_path / "s-000002.rec").rename(tmp_path / "r-000002.rec")
    with pytest.raises(RecordingError, match="are files of different recordings"):
        RecordingWriter.resume(tmp_path / "r.rec", HEADER)


def test_an_older_file_that_is_damaged_keeps_nobody_from_going_on_and_the_newest_does(tmp_path: Path) -> None:
    path = tmp_path / "r.rec"
    scribe = begun(path)
    scribe.rotate()
    scribe.rotate()
    scribe.writer.close()
    (tmp_path / "r-000002.rec").write_bytes(b"gone")
    RecordingWriter.resume(path, HEADER).close()
    (tmp_path / "r-000003.rec").write_bytes(b"gone")
    with pytest.raises(RecordingError, match=r"r-000003\.rec is not a recording"):
        RecordingWriter.resume(path, HEADER)


def test_another_file_with_the_name_of_the_next_one_is_not_written_over(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    (tmp_path / "r-000002.rec").write_text("mine")
    with pytest.raises(RecordingError, match=r"cannot go on in .*r-000002\.rec, which is another file"):
        scribe.rotate()
    scribe.writer.abandon()
    assert (tmp_path / "r-000002.rec").read_text() == "mine"


def test_a_damaged_following_file_is_repaired_up_to_the_damage(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    scribe.rotate()
    path = scribe.writer.path
    scribe.step([1, 3])
    bad = scribe.step([1])
    scribe.writer.close()
    database = sqlite3.connect(path)
    database.execute("UPDATE batches SET x = zeroblob(12) WHERE position = ?", (bad,))
    database.commit()
    database.close()
    saved = repair(path, tmp_path / "saved.rec")
    assert saved.left_out
    found = inspect(tmp_path / "saved.rec", lambda _: None)
    assert (found.streams, found.frames) == (2, 2)
    with RecordingReader(tmp_path / "saved.rec") as reader:
        assert reader.header.number == 2
        assert reader.last_position == bad


def test_a_following_file_says_what_it_is(tmp_path: Path) -> None:
    scribe = begun(tmp_path / "r.rec")
    scribe.rotate()
    scribe.writer.close()
    with RecordingReader(tmp_path / "r.rec") as reader:
        assert reader.finished
        assert reader.followed_by == "r-000002.rec"
        assert how_it_ends(reader) == "goes on in r-000002.rec"
    (tmp_path / "r-000002.rec").unlink()
    with RecordingReader(tmp_path / "r.rec") as reader:
        assert how_it_ends(reader) == "goes on in r-000002.rec, which is not there"
        # Before a following file has its name, its writer may die.
        (tmp_path / "r-000002.rec-new").touch()
        assert how_it_ends(reader) == "not closed: its engine ended without closing it"


def reading(path: Path) -> sqlite3.Connection:
    """Somebody in the middle of reading."""
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchall()
    return reader


def test_a_reader_of_the_new_file_from_its_first_moment_on_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []
    put_in_place = family.put_in_place

    def put_and_read(unfinished: Path, path: Path) -> None:
        assert [file.name for file in tmp_path.iterdir() if "-new" in file.name] == ["r-000002.rec-new"]
        put_in_place(unfinished, path)
        readers.append(reading(path))

    monkeypatch.setattr(family, "put_in_place", put_and_read)
    scribe = begun(tmp_path / "r.rec")
    scribe.rotate()
    scribe.step([1])
    scribe.writer.commit()
    assert readers[0].execute("SELECT count(*) FROM batches").fetchone() == (0,)
    assert rows(tmp_path / "r-000002.rec", "SELECT count(*) FROM batches") == [(1,)]
    readers[0].close()
    scribe.writer.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r-000002.rec", "r.rec"]


@pytest.mark.parametrize("when", ["before it began", "while it was written"])
def test_what_a_killed_writer_left_of_the_next_file_is_in_nobodys_way(tmp_path: Path, when: str) -> None:
    left = [tmp_path / f"r-000002.rec-new{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]
    mine = tmp_path / "r-000002.rec-newer"
    scribe = begun(tmp_path / "r.rec") if when == "while it was written" else None
    for path in (*left, mine):
        path.write_bytes(b"left")
    if scribe is None:
        scribe = begun(tmp_path / "r.rec")
        assert not any(path.exists() for path in left)
    scribe.rotate()
    assert not any(path.exists() for path in left)
    assert mine.read_bytes() == b"left"
    scribe.step([1])
    scribe.writer.close()
    assert inspect(tmp_path / "r-000002.rec", lambda _: None).frames == 1


def test_a_copied_part_is_not_taken_for_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scribe = begun(tmp_path / "r.rec")
    scribe.rotate()
    scribe.writer.close()
    copy = tmp_path / "copy.rec"
    copy.write_bytes((tmp_path / "r-000002.rec").read_bytes())
    tidied = list[Path]()
    monkeypatch.setattr("instep.recording.writer.without_wal", tidied.append)
    scribe.writer = RecordingWriter.resume(copy, HEADER)
    scribe.rotate()
    assert tidied == []
    scribe.writer.close()
