from __future__ import annotations

import errno
import io
import json
import os
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.recording import commands
from instep.recording.app import app
from instep.recording.database import DatabaseLimits
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.repair import repair as save
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.replaying import replay
from tests.support.scribe import Scribe

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
    status = command(*arguments, Console(file=file, width=300))
    return status, file.getvalue()


def test_check_says_in_one_line_what_is_there(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    assert said(commands.check, tmp_path / "a.rec") == (
        0,
        "whole: 2 streams (1 open), 11 frames, 17 positions; closed in order; 2 frames without outputs; 1 restart; "
        "newest checkpoint at position 9\n",
    )


def test_check_of_one_being_written_and_of_one_that_was_killed(tmp_path: Path) -> None:
    scribe = record(tmp_path / "a.rec", close=False)
    status, text = said(commands.check, tmp_path / "a.rec")
    assert status == 0
    assert "; being written; " in text
    scribe.writer.abandon()
    assert "; not closed: its server ended without closing it; " in said(commands.check, tmp_path / "a.rec")[1]


def test_check_of_damage_and_of_what_is_no_recording(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("batches", 5, time_ns=7)
    status, text = said(commands.check, forger.path)
    assert status == 1
    assert text == (
        f"{forger.path} is damaged: the row at position 5 (of batches) does not match its CRC; what comes before the "
        f"damage is saved by: instep recordings repair {forger.path}\n"
    )
    forger = Forger(tmp_path / "a.rec", tmp_path / "c.rec")
    forger.change("states", 2, seq=3, tail_seq=1)
    assert said(commands.check, forger.path)[0] == 1
    batch, at = Forger(tmp_path / "a.rec", tmp_path / "d.rec").find_frame(2, 1)
    forger = Forger(tmp_path / "a.rec", tmp_path / "d.rec")
    seqs = forger.column(batch, "seqs")
    seqs[at] = 3
    forger.change_batch(batch, seqs=seqs)
    status, text = said(commands.check, forger.path)
    assert status == 1
    assert "in stream 2 ('stream-2'), frame 1 is missing: frame 3 was recorded in its place" in text
    assert said(commands.check, tmp_path / "nothing.rec")[0] == 2
    (tmp_path / "h.py").write_text("print('hello')\n" * 100)
    status, text = said(commands.check, tmp_path / "h.py")
    assert status == 2
    assert text.startswith(
        f"not read: {tmp_path / 'h.py'} is not a recording: it is not an SQLite database, or its first"
    )
    (tmp_path / "empty.rec").touch()
    status, text = said(commands.check, tmp_path / "empty.rec")
    assert status == 2
    assert text.startswith("not read: ")


def test_a_name_that_no_file_can_have_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    for command in (commands.check, commands.info, commands.list_folder):
        status, text = said(command, path)
        assert (status, "File name too long" in text, len(text.splitlines())) == (commands.NOT_READ, True, 1)
    status, text = said(commands.repair, path, tmp_path / "saved.rec")
    assert (status, "there is no such file" in text) == (commands.NOT_READ, True)


def test_info_shows_what_it_is(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    status, text = said(commands.info, tmp_path / "a.rec")
    assert status == 0
    for expected in (
        "2023-11-14 22:13:20 UTC",
        "closed in order",
        "test (3 → 4)",
        "/models/test",
        "ab" * 32,
        "instep 0.1.0",
        "commit",
        "2, 1 of them open",
        "6, with 11 frames",
        "newest checkpoint at position 9; a restart replays what comes after it",
        "1 to 17; each opening, batch, output, closing and event has one",
    ):
        assert expected in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)
    assert said(commands.info, tmp_path / "nothing.rec")[0] == 2


def test_list_shows_recordings_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "b.rec")
    record(tmp_path / "a.rec", close=False).writer.abandon()
    (tmp_path / "notes.txt").write_text("hello")
    database = sqlite3.connect(tmp_path / "other.db")
    database.execute("CREATE TABLE t (a)")
    database.close()
    Forger(tmp_path / "b.rec", tmp_path / "c.rec", fix_crc=False).change("newest", 17, position=3)
    old = Forger(tmp_path / "b.rec", tmp_path / "old.rec")
    database = sqlite3.connect(old.path)
    database.execute("PRAGMA user_version=9")
    database.close()
    (tmp_path / "x.instep").write_text("text")
    (tmp_path / "y.instep").write_text("text")
    (tmp_path / "y.rec").write_text("text")
    path_open = Path.open

    def open_mine(path: Path, *how: Any, **also: Any) -> Any:
        if path.name in ("y.instep", "y.rec"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return path_open(path, *how, **also)

    monkeypatch.setattr(Path, "open", open_mine)
    status, text = said(commands.list_folder, tmp_path)
    assert status == 0
    names = ["a.rec", "b.rec", "c.rec", "old.rec", "x.instep", "y.instep"]
    assert [line.split("  ")[0] for line in text.splitlines()] == ["file", *names]
    for line, ending in zip(
        text.splitlines()[1:],
        ["not closed", "closed", "damaged", "of another version", "not a recording", "unreadable now"],
        strict=True,
    ):
        assert f"  {ending}  " in line
    assert re.search(r"2023-11-14 22:13 .* 2 +1 +11 +0\.\d$", text.splitlines()[2])
    assert "notes" not in text
    assert "other.db" not in text
    (tmp_path / "empty").mkdir()
    assert said(commands.list_folder, tmp_path / "empty") == (0, f"{tmp_path / 'empty'} holds no recordings\n")
    assert said(commands.list_folder, tmp_path / "missing")[0] == 2
    status, text = said(commands.list_folder, tmp_path / "a.rec")
    assert (status, f"{tmp_path / 'a.rec'} is not a folder: name the one that it is in" in text) == (2, True), text


def test_a_terminal_of_80_columns_shows_every_word(tmp_path: Path) -> None:
    path = tmp_path / "a-recording-with-a-name-that-is-longer-than-others-of-2023-11-14.rec"
    record(path)
    for command, argument in ((commands.info, path), (commands.list_folder, tmp_path)):
        file = io.StringIO()
        assert command(argument, Console(file=file, width=80, force_terminal=True, color_system=None)) == 0
        assert all(len(line) <= 80 for line in file.getvalue().splitlines())
        _, piped = said(command, argument)
        assert sorted("".join(file.getvalue().split())) == sorted("".join(piped.split()))


def said_json(capsys: pytest.CaptureFixture[str], command: Any, *arguments: Any) -> tuple[int, Any]:
    file = io.StringIO()
    status = command(*arguments, Console(file=file), json=True)
    assert file.getvalue() == ""
    return status, json.loads(capsys.readouterr().out)


def test_json_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    record(path)
    status, found = said_json(capsys, commands.check, path)
    assert (status, found["whole"], found["file"], found["frames"]) == (0, True, str(path), 11)
    status, found = said_json(capsys, commands.info, path)
    assert (status, found["streams"], found["open_streams"], found["bytes"]) == (0, 2, 1, path.stat().st_size)
    status, listed = said_json(capsys, commands.list_folder, tmp_path)
    assert (status, [each["file"] for each in listed]) == (0, [str(path)])
    status, found = said_json(capsys, commands.check, tmp_path / "missing.rec")
    assert (status, found["whole"]) == (2, False)
    assert "no such file" in found["error"].lower()


def test_list_cuts_nothing_on_a_narrow_terminal(tmp_path: Path) -> None:
    long = tmp_path / f"{'a-very-long-name' * 5}.instep"
    RecordingWriter.create(long, HEADER).close()
    file = io.StringIO()
    assert commands.list_folder(tmp_path, Console(file=file, width=40)) == 0
    assert [line.split()[0] for line in file.getvalue().splitlines()] == ["file", long.name]


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
    status, text = said(commands.repair, forger.path, None)
    assert status == 0
    repaired = tmp_path / "b.repaired.rec"
    assert text == (
        f"{repaired}: saved 11 frames of 2 streams (14 positions); left out: positions 15 to 17 (the row at position "
        "15 (of outputs) does not match its CRC)\n"
    )
    assert forger.path.read_bytes() == before
    assert history(repaired)[:14] == rows[:14]
    assert [row[4] for row in history(repaired)[14:]] == ["repaired"]
    assert said(commands.check, repaired)[0] == 0
    with Recovered(repaired) as recovered:
        assert recovered.checkpoint_position == 9
        found = replay(recovered, gru_step(GRU))
    assert found.seqs == {1: 5, 2: 6}


def test_repair_gives_up_states_that_are_damaged_and_keeps_the_history(tmp_path: Path) -> None:
    scribe = record(tmp_path / "a.rec", close=False)
    scribe.writer.close()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("states", 2, seq=1)
    assert said(commands.check, forger.path)[0] == 1
    status, text = said(commands.repair, forger.path, tmp_path / "c.rec")
    assert status == 0
    assert "(16 positions); left out: the states of the newest checkpoint, which can be computed from" in text
    with Recovered(tmp_path / "c.rec") as recovered:
        assert recovered.checkpoint_position == 0
        found = replay(recovered, gru_step(GRU))
    for stream in (1, 2):
        assert found.states[stream].tobytes() == scribe.states[stream].tobytes()
    RecordingWriter.resume(tmp_path / "c.rec", HEADER).close()
    assert said(commands.check, tmp_path / "c.rec")[0] == 0


@pytest.mark.parametrize("is_damaged", [False, True])
def test_repair_takes_newer_states_of_a_snapshot_under_way_only_with_the_whole_history(
    tmp_path: Path, is_damaged: bool
) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", HEADER), gru_step(GRU))
    scribe.open(1)
    scribe.open(2)
    older = scribe.step([1, 2])
    scribe.checkpoint(older)
    newer = scribe.step([1, 2])
    scribe.checkpoint(newer, only=[1], is_part=True)
    scribe.writer.close()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    if is_damaged:
        forger.change("batches", newer, time_ns=7)
    found_left_out = save(forger.path, tmp_path / "c.rec").left_out
    assert ("the states of the newest checkpoint" in found_left_out) == is_damaged
    with Recovered(tmp_path / "c.rec") as recovered:
        assert [stream.seq for stream in recovered.load(recovered.names)] == ([0, 0] if is_damaged else [2, 1])
        found = replay(recovered, gru_step(GRU))
    assert found.seqs == ({1: 1, 2: 1} if is_damaged else {1: 2, 2: 2})


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
    assert said(commands.check, tmp_path / "b.rec")[0] in (1, 2)
    status, text = said(commands.repair, tmp_path / "b.rec", tmp_path / "c.rec")
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
    status, text = said(commands.repair, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, text) == (
        2,
        f"not repaired: nothing of {tmp_path / 'a.rec'} can be saved, neither frames nor states: the rows (of batches, "
        "openings, outputs, states) cannot be read: database disk image is malformed\n",
    )
    assert set(tmp_path.iterdir()) == before


def test_repair_of_what_is_whole_writes_nothing(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    status, text = said(commands.repair, tmp_path / "a.rec", tmp_path / "b.rec")
    assert (status, text) == (0, f"{tmp_path / 'a.rec'} is whole: nothing to repair, and nothing was written\n")
    assert not (tmp_path / "b.rec").exists()


def test_repair_of_what_cannot_be_saved(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    for path, why in (
        (tmp_path / "missing.rec", "no such file"),
        (tmp_path / "header.rec", "nothing of .* can be saved: the header 'model_name' is damaged"),
        (tmp_path / "text.rec", "can be saved"),
        (tmp_path / "forged.rec", "forged.rec cannot be repaired, .* but inconsistent: the batch at position 3"),
    ):
        if path.name == "header.rec":
            Forger(tmp_path / "a.rec", path, fix_crc=False).change_header("model_name", '"x"')
        elif path.name == "text.rec":
            path.write_text("frames" * 100)
        elif path.name == "forged.rec":
            Forger(tmp_path / "a.rec", path).change("batches", 3, size=0)
        status, text = said(commands.repair, path, tmp_path / "new.rec")
        assert status == 2
        assert re.search(why, text), text
        assert not (tmp_path / "new.rec").exists()
    forger = Forger(tmp_path / "a.rec", tmp_path / "b.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    status, text = said(commands.repair, forger.path, tmp_path / "a.rec")
    assert status == 2
    assert "never written over" in text
    status, text = said(commands.repair, forger.path, tmp_path / "no folder" / "b.rec")
    assert status == 2
    assert "there is no folder" in text
    for name in ("b" * 300, "b" * 250):  # the second is too long with what SQLite appends
        status, text = said(commands.repair, forger.path, tmp_path / name)
        assert (status, "File name too long; name another file" in text) == (2, True)
        status, text = said(commands.cut_out, tmp_path / "a.rec", tmp_path / name, None, None)
        assert (status, "File name too long; name another file" in text) == (2, True)


def test_as_typed(tmp_path: Path) -> None:
    record(tmp_path / "a.rec")
    runner = CliRunner()
    assert runner.invoke(app, ["check", str(tmp_path / "a.rec")]).exit_code == 0
    assert runner.invoke(app, ["info", str(tmp_path / "a.rec")]).exit_code == 0
    assert runner.invoke(app, ["list", str(tmp_path)]).exit_code == 0
    assert runner.invoke(app, ["repair", str(tmp_path / "a.rec"), "--output", str(tmp_path / "b.rec")]).exit_code == 0
    assert runner.invoke(app, ["check", str(tmp_path / "missing.rec")]).exit_code == 2
    forger = Forger(tmp_path / "a.rec", tmp_path / "c.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    repair, saved = ["repair", str(forger.path)], [tmp_path / "as-argument.rec", tmp_path / "as-option.rec"]
    assert runner.invoke(app, [*repair, str(saved[0])]).exit_code == 0
    as_json = runner.invoke(app, [*repair, "--output", str(saved[1]), "--json"])
    assert (as_json.exit_code, json.loads(as_json.stdout)["output"]) == (0, str(saved[1]))
    assert history(saved[0])[:14] == history(saved[1])[:14] == history(tmp_path / "a.rec")[:14]
    twice = runner.invoke(app, [*repair, str(tmp_path / "d.rec"), "--output", str(tmp_path / "e.rec")])
    assert (twice.exit_code, "the new file is given twice" in twice.stderr) == (2, True)
