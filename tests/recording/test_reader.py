from __future__ import annotations

import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record
from tests.support.rows import open_stream

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "good.rec"
    record(path, HEADER, gru_step(GRU), [5, 0, 9, 40], initial=[2], leave_open=[3])
    return path


def read_all(path: Path) -> None:
    with RecordingReader(path) as reader:
        reader.check_positions()
        reader.streams()
        list(reader.events())
        list(batches_of(reader))


def test_streams_come_back_with_their_states(path: Path) -> None:
    with RecordingReader(path) as reader:
        assert reader.header == HEADER
        assert reader.finished
        infos = reader.streams()
    assert [info.stream for info in infos] == [1, 2, 3, 4]
    assert [info.name for info in infos] == ["stream-1", "stream-2", "stream-3", "stream-4"]
    assert [info.frames for info in infos] == [5, 0, 9, None]
    assert [info.reason for info in infos] == ["closed by its client"] * 3 + [None]
    assert (infos[3].closed_ns, infos[3].closed_position, infos[3].final_state) == (None, None, None)
    assert infos[0].initial_state is None
    assert infos[2].initial_state is not None
    assert infos[2].initial_state.shape == (2 * 4 * 4,)
    final = infos[1].final_state
    assert final is not None
    assert not final.any()


def test_a_final_state_is_missing_only_where_it_was_lost(path: Path, tmp_path: Path) -> None:
    forger = Forger(path, tmp_path / "forged.rec")
    closing = forger.rows("closings")[0]["position"]
    forger.change("closings", closing, final_state=None)
    with pytest.raises(DamagedRecording):
        read_all(forger.path)
    forger.change("closings", closing, reason="state_lost")
    read_all(forger.path)


@pytest.mark.parametrize("detail", ["[" * 100_000, "{", '{"durability": 3}', '{"surprise": 1}', "[]"])
def test_what_changed_with_an_engine_is_checked(path: Path, tmp_path: Path, detail: str) -> None:
    RecordingWriter.resume(path, replace(HEADER, instep_version="0.2")).close()
    forger = Forger(path, tmp_path / "forged.rec")
    event = next(row for row in forger.rows("events") if row["kind"] == "engine")
    forger.change("events", event["position"], detail=detail)
    with RecordingReader(forger.path) as reader, pytest.raises(DamagedRecording):
        assert reader.engines


def test_batches_come_back_in_order_and_by_range(path: Path) -> None:
    with RecordingReader(path) as reader:
        reader.check_positions()
        batches = list(batches_of(reader))
        assert sum(len(batch.seqs) for batch in batches) == 54
        middle = batches[3]
        part = list(batches_of(reader, middle.position, middle.position + 3))
        assert [batch.position for batch in part] == [middle.position, middle.position + 2]
        assert [batch.y is not None for batch in part] == [True, True]
    assert [batch.position for batch in batches] == sorted(batch.position for batch in batches)
    assert middle.x.shape == (len(middle.streams), 3)
    assert middle.y is not None
    assert middle.y.shape == (len(middle.streams), 4)


def test_a_reader_shows_what_was_committed_when_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "live.rec"
    writer = record(path, HEADER, gru_step(GRU), [3, 3], finish=False)
    with RecordingReader(path) as early:
        seen = early.last_position
        writer.event(1, "later", None, "")
        open_stream(writer, 3, "late", 1, 0, 1, None)
        writer.commit()
        writer.position += 5  # as if a commit came between the tables: what is later may look torn
        writer.event(1, "latest", None, "")
        writer.commit()
        assert list(early.events()) == []
        assert len(early.streams()) == 2
        early.check_positions()
        with RecordingReader(path) as late:
            assert late.last_position == seen + 8
            assert [event.kind for event in late.events()] == ["later", "latest"]
            assert len(late.streams()) == 3
    writer.close()


def test_commits_while_it_opens_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "live.rec"
    writer = record(path, HEADER, gru_step(GRU), [3], finish=False)

    class Overtaken(sqlite3.Connection):
        """A commit follows each of the first queries."""

        def execute(self, *query: Any) -> sqlite3.Cursor:
            found = super().execute(*query)
            if writer.position < 50:
                writer.event(1, "meanwhile", None, "")
                writer.commit()
            return found

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Overtaken))
    with RecordingReader(path) as reader:
        monkeypatch.undo()
        assert [info.frames for info in reader.streams()] == [3]
        reader.check_positions()
    writer.close()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot read the recording .*No such file"):
        RecordingReader(tmp_path / "missing.rec")
    with pytest.raises(
        RecordingError, match=r"cannot read the recording (.*): it is a folder; .* `instep recordings info \1`"
    ):
        RecordingReader(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("frames, frames, frames\n" * 100)
    with pytest.raises(RecordingError, match="it is not an SQLite database, or its first bytes are damaged"):
        RecordingReader(text)
    (tmp_path / "empty").touch()
    with pytest.raises(RecordingError, match="another kind of database, or empty"):
        RecordingReader(tmp_path / "empty")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE batches (position)")
    other.close()
    with pytest.raises(RecordingError, match="another kind of database"):
        RecordingReader(tmp_path / "other.db")


@pytest.mark.parametrize(("version", "advice"), [(1, "record anew"), (3, "use the instep that wrote it")])
def test_another_format_version_is_refused(path: Path, version: int, advice: str) -> None:
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version={version}")
    database.close()
    with pytest.raises(RecordingError, match=f"format version {version}, and this instep reads version 2: {advice}"):
        RecordingReader(path)


@pytest.mark.parametrize("table", ["openings", "batches", "outputs", "closings", "events"])
def test_a_changed_row_is_named(path: Path, table: str) -> None:
    forger = Forger(path, path.parent / "forged.rec", fix_crc=False)
    position = forger.rows(table)[-1]["position"]
    forger.change(table, position, time_ns=5)
    with pytest.raises(RecordingError, match=rf"position {position} \(of {table}\) does not match its CRC"):
        read_all(forger.path)


@pytest.mark.parametrize("table", ["openings", "batches", "outputs", "closings", "events"])
def test_a_lost_row_is_named(path: Path, table: str) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    position = forger.rows(table)[0]["position"]
    forger.remove(table, position)
    with pytest.raises(RecordingError, match=rf"row at position {position} is missing"):
        read_all(forger.path)


def test_columns_of_the_wrong_size_are_damage_even_with_the_right_crc(path: Path) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    batch, outputs = forger.rows("batches")[0], forger.rows("outputs")[0]
    for table, row, name in [
        *(("batches", batch, name) for name in ("streams", "seqs", "x")),
        ("outputs", outputs, "y"),
    ]:
        forger = Forger(path, path.parent / "forged.rec")
        forger.change(table, row["position"], **{name: row[name][:-1]})
        with pytest.raises(RecordingError, match="bytes where"):
            read_all(forger.path)
    forger = Forger(path, path.parent / "forged.rec")
    forger.change("batches", batch["position"], size=0)
    with pytest.raises(RecordingError, match=f"the batch at position {batch['position']} holds 0 frames"):
        read_all(forger.path)
    forger = Forger(path, path.parent / "forged.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], final_state=b"1234")
    with pytest.raises(RecordingError, match="holds 4 bytes where 32 belong"):
        read_all(forger.path)


def test_a_close_without_an_opening_is_damage(path: Path) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], stream=77)
    with pytest.raises(RecordingError, match="stream 77 was closed, but never opened"):
        read_all(forger.path)
