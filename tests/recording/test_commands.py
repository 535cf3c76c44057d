from __future__ import annotations

import io
import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.cli import app
from instep.recording import commands
from instep.recording.copies import repair
from instep.recording.database import DatabaseLimits
from instep.recording.errors import RecordingError, with_advice
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.replaying import replay
from tests.support.scribe import Scribe
from tests.support.written import write_recording

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU), model_folder="/models/test")


def record(path: Path, *, close: bool = True) -> Scribe:
    scribe = Scribe(RecordingWriter.create(path, HEADER), gru_step(GRU))
    scribe.open(1)
    scribe.open(2, scribe.random_state())
    for _ in range(3):
        scribe.step([1, 2])
    scribe.checkpoint(scribe.step([2]))
    scribe.step([1, 2], "unanswered")
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(path, HEADER)
    scribe.step([2, 1])
    scribe.writer.commit()
    if close:
        scribe.close(1)
        scribe.writer.close()
    return scribe


def said(command: Any, *arguments: Any) -> tuple[int, str]:
    file = io.StringIO()
    try:
        status = command(*arguments, Console(file=file, width=300))
    except RecordingError as error:
        return 2, f"{with_advice(error)}\n"
    return status or 0, file.getvalue()


def test_info_shows_what_it_is(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    status, text = said(commands.info, tmp_path / "a.rec")
    assert status == 0
    shown = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line)
    expected = {
        "began": "2023-11-14 22:13:20 UTC",
        "ends": "closed in order",
        "model": "test",
        "model folder": "/models/test",
        "fingerprint": "ab" * 32,
        "instep version": "0.1.0",
        "streams": "2",
        "open streams": "1",
        "frames": "11",
        "checkpoint position": "9",
        "last position": "17",
    }
    assert {name: shown[name].strip() for name in expected} == expected
    assert said(commands.info, tmp_path / "nothing.rec")[0] == 2


def test_info_of_a_folder_has_a_line_for_each_recording_and_nothing_else(tmp_path: Path) -> None:
    record(tmp_path / "b.rec")
    record(tmp_path / "a.rec", close=False).writer.abandon()
    (tmp_path / "notes.txt").write_text("hello")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.close()
    status, text = said(commands.info, tmp_path)
    first, second = text.splitlines()
    assert (status, first.split(":")[0], second.split(":")[0]) == (0, "a.rec", "b.rec")
    assert ", not closed: its server ended" in first
    assert "test from 2023-11-14 22:13:20 UTC, 2 streams (1 open), 11 frames, closed in order; " in second
    (tmp_path / "x.instep").write_text("text")
    status, text = said(commands.info, tmp_path)
    assert (status, "x.instep is not a recording" in text.splitlines()[2]) == (2, True)
    Forger(tmp_path / "b.rec", tmp_path / "c.rec", fix_crc=False).change("newest", 17, position=3)
    status, text = said(commands.info, tmp_path)
    assert (status, "c.rec is damaged" in text.splitlines()[2]) == (2, True)
    (tmp_path / "empty").mkdir()
    assert said(commands.info, tmp_path / "empty") == (0, "")


@pytest.mark.parametrize("name", ["missing.rec", "x" * 300])
def test_a_recording_that_there_is_not_is_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    for command, arguments in ((commands.info, ()), (commands.repair_file, (tmp_path / "saved.rec",))):
        status, text = said(command, tmp_path / name, *arguments)
        assert (status, len(text.splitlines())) == (2, 1)


def test_info_as_json(tmp_path: Path) -> None:
    path, runner = tmp_path / "a.rec", CliRunner()
    record(path)
    of_file, of_folder = (
        json.loads(runner.invoke(app, ["recordings", "info", str(place), "--json"]).stdout)
        for place in (path, tmp_path)
    )
    assert of_file == of_folder
    assert (of_file["streams"], of_file["open_streams"], of_file["bytes"]) == (2, 1, path.stat().st_size)
    missing = runner.invoke(app, ["recordings", "info", str(tmp_path / "missing.rec"), "--json"])
    assert (missing.exit_code, list(json.loads(missing.stdout))) == (2, ["error"])


def test_info_of_a_recording_whose_wal_is_damaged_is_status_1(tmp_path: Path) -> None:
    scribe, killed = record(tmp_path / "a.rec", close=False), tmp_path / "k.rec"
    for _ in range(3):
        scribe.step([1, 2])
        scribe.writer.commit()
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{tmp_path / 'a.rec'}{suffix}", f"{killed}{suffix}")
    assert said(commands.info, killed)[0] == 0
    wal = bytearray(Path(f"{killed}-wal").read_bytes())
    wal[len(wal) // 2] ^= 255
    Path(f"{killed}-wal").write_bytes(wal)
    status, text = said(commands.info, killed)
    assert (status, "its WAL is damaged after" in " ".join(text.split())) == (1, True)
    assert said(commands.info, tmp_path)[0] == 1


def test_control_characters_of_a_strange_file_are_escaped(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    Forger(tmp_path / "a.rec", tmp_path / "b.rec").change_header("model_name", json.dumps("\x1b[31mred"))
    for place in (tmp_path / "b.rec", tmp_path):
        status, text = said(commands.info, place)
        assert (status, "\\x1b[31mred" in text, "\x1b" in text) == (0, True, False)


def history(path: Path) -> list[Any]:
    """Rows of all kinds, by position."""
    with RecordingReader(path) as reader:
        rows = [row for table in ("openings", "batches", "outputs", "closings", "events") for row in reader.rows(table)]
    return sorted(rows, key=lambda row: int(row[0]))


def test_repair_keeps_everything_before_the_damage(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    rows = history(tmp_path / "a.rec")
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    before = forger.path.read_bytes()
    status, text = said(commands.repair_file, forger.path, None)
    assert status == 0
    repaired = tmp_path / "b.repaired.rec"
    assert text == (
        f"{repaired}: saved 11 frames of 2 streams (14 positions); left out: positions 15 to 17 (the row at position "
        "15 (of outputs) does not match its CRC)\n"
    )
    assert forger.path.read_bytes() == before
    assert history(repaired)[:14] == rows[:14]
    assert [row[4] for row in history(repaired)[14:]] == ["repaired"]
    inspect(repaired)
    with Recovered(repaired) as recovered:
        assert recovered.checkpoint_position == 9
        found = replay(recovered, gru_step(GRU))
    assert found.seqs == {1: 5, 2: 6}


def test_repair_gives_up_states_that_are_damaged_and_keeps_the_history(tmp_path: Path) -> None:
    scribe = record(tmp_path / "a.rec", close=False)
    scribe.writer.close()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("states", 2, seq=1)
    status, text = said(commands.repair_file, forger.path, tmp_path / "c.rec")
    assert status == 0
    assert "(16 positions); left out: the states of the newest checkpoint, which can be computed from" in text
    with Recovered(tmp_path / "c.rec") as recovered:
        assert recovered.checkpoint_position == 0
        found = replay(recovered, gru_step(GRU))
    for stream in (1, 2):
        assert found.states[stream].tobytes() == scribe.states[stream].tobytes()
    RecordingWriter.resume(tmp_path / "c.rec", HEADER).close()
    inspect(tmp_path / "c.rec")


def test_repair_takes_no_states_of_a_snapshot_that_the_saved_history_does_not_reach(tmp_path: Path) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", HEADER), gru_step(GRU))
    scribe.open(1)
    scribe.open(2)
    older = scribe.step([1, 2])
    scribe.checkpoint(older)
    newer = scribe.step([1, 2])
    scribe.checkpoint(newer, only=[1], is_part=True)
    scribe.writer.close()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("batches", newer, time_ns=7)
    assert "the states of the newest checkpoint" in repair(forger.path, tmp_path / "c.rec").left_out
    with Recovered(tmp_path / "c.rec") as recovered:
        assert [stream.seq for stream in recovered.load(recovered.names)] == [0, 0]
        found = replay(recovered, gru_step(GRU))
    assert found.seqs == {1: 1, 2: 1}


@pytest.mark.parametrize("keep", [0.7, 0.9, 0.98])
def test_repair_of_a_file_that_was_cut_off(tmp_path: Path, keep: float) -> None:
    small = DatabaseLimits(page_bytes=1024)
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", HEADER, limits=small), gru_step(GRU))
    scribe.open(1)
    for _ in range(300):
        scribe.step([1])
    scribe.writer.close()
    rows = history(tmp_path / "a.rec")
    content = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "b.rec").write_bytes(content[: int(len(content) * keep)])
    status, text = said(commands.repair_file, tmp_path / "b.rec", tmp_path / "c.rec")
    assert status == 0, text
    saved = history(tmp_path / "c.rec")
    assert saved[:-1] == rows[: len(saved) - 1]
    assert len(saved) > 10
    assert "left out: positions" in text


def test_repair_that_would_save_no_frame_writes_nothing(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    connection = sqlite3.connect(tmp_path / "a.rec", isolation_level=None)
    pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_master"))
    page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    with (tmp_path / "a.rec").open("r+b") as file:
        for table in ("openings", "batches", "outputs", "states"):
            file.seek((pages[table] - 1) * page_bytes)
            file.write(bytes(page_bytes))
    before = set(tmp_path.iterdir())
    status, text = said(commands.repair_file, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, f"nothing of {tmp_path / 'a.rec'} can be saved (the rows after" in text) == (2, True)
    assert set(tmp_path.iterdir()) == before


def test_repair_of_what_is_whole_writes_nothing(tmp_path: Path) -> None:
    write_recording(tmp_path)
    status, text = said(commands.repair_file, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, text) == (0, f"{tmp_path / 'a.rec'} is whole: nothing to repair, and nothing was written\n")
    assert not (tmp_path / "b.rec").exists()


def test_repair_of_what_cannot_be_saved(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    for path, why in (
        (tmp_path / "missing.rec", "No such file"),
        (tmp_path / "header.rec", "nothing of .* can be saved: .*the header 'model_name' is damaged"),
        (tmp_path / "text.rec", "can be saved"),
        (tmp_path / "forged.rec", "forged.rec cannot be repaired, .* but inconsistent: the batch at position 3"),
    ):
        if path.name == "header.rec":
            Forger(tmp_path / "a.rec", path, fix_crc=False).change_header("model_name", '"x"')
        elif path.name == "text.rec":
            path.write_text("frames" * 100)
        elif path.name == "forged.rec":
            Forger(tmp_path / "a.rec", path).change("batches", 3, size=0)
        status, text = said(commands.repair_file, path, tmp_path / "new.rec")
        assert status == 2
        assert re.search(why, text), text
        assert not (tmp_path / "new.rec").exists()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    status, text = said(commands.repair_file, forger.path, tmp_path / "a.rec")
    assert status == 2
    assert "never written over" in text
    status, text = said(commands.repair_file, forger.path, tmp_path / "no folder" / "b.rec")
    assert status == 2
    assert "there is no folder" in text
    for name in ("b" * 300, "b" * 250):  # the second is too long with what SQLite appends
        status, text = said(commands.repair_file, forger.path, tmp_path / name)
        assert (status, "File name too long; name another file" in text) == (2, True)
        status, text = said(commands.cut_file, tmp_path / "a.rec", tmp_path / name, None, None)
        assert (status, "File name too long; name another file" in text) == (2, True)


def test_repair_takes_no_lock_for_damage(tmp_path: Path) -> None:
    scribe = record(tmp_path / "a.rec", close=False)
    status, text = said(commands.repair_file, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, "is being written by another instep" in text) == (2, True)
    scribe.writer.close()
    with closing(sqlite3.connect(tmp_path / "a.rec", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        status, text = said(commands.repair_file, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, "cannot be read now" in text) == (2, True)
    assert not (tmp_path / "b.rec").exists()
