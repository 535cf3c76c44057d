from __future__ import annotations

import sqlite3
from collections.abc import Callable
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


def test_other_files_are_refused(path: Path) -> None:
    folder, database = path.parent, sqlite3.connect(path.with_name("other.db"))
    database.execute("CREATE TABLE batches (position)")
    database.close()
    (folder / "text").write_text("frames, frames, frames\n" * 100)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    for name in ("missing", "folder", "text", "empty", "other.db"):
        with pytest.raises(RecordingError) as refused:
            RecordingReader(folder / name)
        assert str(folder / name) in str(refused.value)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_refused(path: Path, version: int) -> None:
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version={version}")
    database.close()
    with pytest.raises(RecordingError, match=f"version {version}"):
        RecordingReader(path)


@pytest.mark.parametrize("table", ["openings", "batches", "outputs", "closings", "events"])
def test_a_row_that_was_changed_or_lost_is_named(path: Path, table: str) -> None:
    forger = Forger(path, path.parent / "forged.rec", fix_crc=False)
    position = forger.rows(table)[-1]["position"]
    forger.change(table, position, time_ns=5)
    for number in (position, forger.rows(table)[0]["position"]):
        with pytest.raises(DamagedRecording, match=rf"position {number}\b"):
            read_all(forger.path)
        forger = Forger(path, path.parent / "forged.rec")
        forger.remove(table, forger.rows(table)[0]["position"])


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        *(("batches", name, lambda row, name=name: row[name][:-1]) for name in ("streams", "seqs", "x")),
        ("batches", "size", lambda row: 0),
        ("outputs", "y", lambda row: row["y"][:-1]),
        ("closings", "final_state", lambda row: b"1234"),
        ("closings", "stream", lambda row: 77),
    ],
)
def test_what_does_not_fit_is_damage_even_with_the_right_crc(
    path: Path, table: str, column: str, value: Callable[[dict[str, Any]], object]
) -> None:
    forger = Forger(path, path.parent / "forged.rec")
    row = forger.rows(table)[0]
    forger.change(table, row["position"], **{column: value(row)})
    with pytest.raises(DamagedRecording):
        read_all(forger.path)
