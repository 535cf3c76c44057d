from __future__ import annotations

import io
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from instep.program import app
from instep.recording import commands
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.server.checks import CannotServe
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
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
        "trimmed": "never",
    }
    assert {name: shown[name].strip() for name in expected} == expected
    assert said(commands.info, tmp_path / "nothing.rec")[0] == 2


def test_info_of_a_folder_has_a_line_for_each_recording_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "shard-0").mkdir()
    record(tmp_path / "shard-0" / "b.rec")
    record(tmp_path / "a.rec", close=False).writer.abandon()
    (tmp_path / "notes.txt").write_text("hello")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.close()
    status, text = said(commands.info, tmp_path)
    first, second = text.splitlines()
    assert (status, first.split(":")[0], second.split(":")[0]) == (0, "a.rec", "shard-0/b.rec")
    assert ", not closed: its server ended" in first
    assert "test from 2023-11-14 22:13:20 UTC, 2 streams (1 open), 11 frames, closed in order; " in second
    (tmp_path / "x.instep").write_text("text")
    status, text = said(commands.info, tmp_path)
    assert (status, "x.instep is not a recording" in text.splitlines()[2]) == (2, True)
    Forger(tmp_path / "shard-0" / "b.rec", tmp_path / "c.rec", fix_crc=False).change("newest", 17, position=3)
    status, text = said(commands.info, tmp_path)
    assert (status, "c.rec is damaged" in text.splitlines()[1]) == (2, True)
    (tmp_path / "empty").mkdir()
    assert said(commands.info, tmp_path / "empty") == (0, "")


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


def test_repair_of_what_is_whole_writes_nothing(tmp_path: Path) -> None:
    write_recording(tmp_path)
    status, text = said(commands.repair_file, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, text) == (0, f"{tmp_path / 'a.rec'} is whole: nothing to repair, and nothing was written\n")
    assert not (tmp_path / "b.rec").exists()


def test_repair_names_the_new_file_and_what_was_left_out(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    status, text = said(commands.repair_file, forger.path, None)
    assert (status, (tmp_path / "b.repaired.rec").exists()) == (0, True)
    assert f"{tmp_path / 'b.repaired.rec'}: saved 11 frames of 2 streams (14 positions)" in text
    assert "positions 15 to 17" in text
    for name in (tmp_path / "a.rec", tmp_path / "no folder" / "b.rec", tmp_path / ("b" * 300), tmp_path / ("b" * 250)):
        assert said(commands.repair_file, forger.path, name)[0] == 2
        assert said(commands.cut_file, tmp_path / "a.rec", name, None, None)[0] == 2


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


def test_control_characters_of_a_strange_file_are_escaped(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    Forger(tmp_path / "a.rec", tmp_path / "b.rec").change_header("model_name", json.dumps("\x1b[31mred"))
    for place in (tmp_path / "b.rec", tmp_path):
        status, text = said(commands.info, place)
        assert (status, "\\x1b[31mred" in text, "\x1b" in text) == (0, True, False)


def test_advice_for_a_full_disk_is_given_once() -> None:
    full = with_advice(RecordingError("database or disk is full"))
    assert full != "database or disk is full"
    assert with_advice(CannotServe(full)) == full
