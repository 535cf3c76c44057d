from __future__ import annotations

import io
import json
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from instep.program import app
from instep.replay.command import run
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_gru, record_gru


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path, make_gru(), [5, 0, 9])


def verify(path: Path, streams: Sequence[str] = (), *, json: bool = False) -> tuple[int, str]:
    file = io.StringIO()
    status = run([path], None, streams, Console(file=file, width=160), json=json)
    return status, file.getvalue()


def test_a_good_recording(recorded: Recorded) -> None:
    status, text = verify(recorded.path)
    assert status == 0
    *_, checkers, verdict = text.splitlines()
    assert re.fullmatch(
        r"compiled step: every frame, bit for bit; definition: every frame, bit for bit; torch's own module: at most "
        r"\d\.\de-0\d away, as rounding explains; float64: at most \d\.\de-0\d away",
        checkers,
    )
    assert verdict == "verified: 3 streams, 14 frames, exact, 0 mismatches"


def test_json_is_one_object_on_standard_output_and_nothing_else(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = verify(recorded.path, json=True)
    assert status == 0
    assert text == ""
    fields = json.loads(capsys.readouterr().out)
    assert fields["verified"] is True
    assert fields["file"] == str(recorded.path)
    assert [stream["verdict"] for stream in fields["streams"]] == ["exact", "empty", "exact"]


def test_json_of_what_could_not_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = verify(tmp_path / "missing.rec", json=True)
    assert status == 2
    fields = json.loads(capsys.readouterr().out)
    assert fields["verified"] is False
    assert fields["verdict"] == "not checked"
    assert "cannot read the recording" in fields["error"]


def test_what_breaks_down_is_no_mismatch(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*arguments: Any, **options: Any) -> None:
        raise MemoryError("12 GB")

    monkeypatch.setattr("instep.replay.command.verify", no_memory)
    assert verify(recorded.path) == (2, "not checked: MemoryError('12 GB')\n")
    assert "MemoryError: 12 GB" in capsys.readouterr().err
    assert verify(recorded.path, json=True)[0] == 2
    assert json.loads(capsys.readouterr().out)["error"] == "MemoryError('12 GB')"


def test_files_that_are_no_recordings(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 1000)
    content = recorded.path.read_bytes()
    (tmp_path / "truncated").write_bytes(content[: len(content) // 2])
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE a (b)").connection.close()
    for name in ("text", "truncated", "other"):
        status, text = verify(tmp_path / name)
        assert status == 2, name
        assert text.startswith("not checked: ")
        assert len(text.splitlines()) == 1


def test_a_mismatch(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
    forger.change("closings", forger.rows("closings")[0]["position"], frames=4)
    status, text = verify(forger.path)
    assert status == 1
    assert text.splitlines()[-1].startswith("not verified: 3 streams, 14 frames, 1 mismatch")
    assert verify(forger.path, json=True)[0] == 1
    assert json.loads(capsys.readouterr().out)["mismatches"] == 1
    assert "│" in text
    assert "│" not in verify(forger.path, ["stream-3"])[1], "a table has only streams that differ"
    for pattern, expected in (("stream-3", 0), ("*-[23]", 0), ("stream-*", 1), ("1", 1)):
        assert verify(forger.path, [pattern])[0] == expected, pattern


def test_a_folder_of_recordings_has_a_line_for_each_and_the_worst_status(recorded: Recorded) -> None:
    def typed(*words: str | Path) -> Result:
        return CliRunner().invoke(app, ["verify", *map(str, words)])

    good, folder = recorded.path, recorded.path.parent
    wrong, broken = (folder / name for name in ("b.rec", "c.instep"))
    assert typed(folder).exit_code == 0
    broken.write_text("hello " * 1000)
    assert typed(good, folder).exit_code == 2
    forger = Forger(good, wrong)
    forger.change("closings", forger.rows("closings")[0]["position"], frames=4)
    verified = typed(folder)
    first, second, *_, third, summary = verified.stdout.splitlines()
    assert verified.exit_code == 1
    for line, start in ((first, f"{good}: verified: "), (second, f"{wrong}: not"), (third, f"{broken}: not checked: ")):
        assert line.startswith(start)
    assert summary.startswith("not verified: 3 recordings")


def test_a_recording_without_frames_among_several_is_named_and_no_failure(recorded: Recorded, tmp_path: Path) -> None:
    def typed(*words: str | Path) -> tuple[int, list[str]]:
        result = CliRunner().invoke(app, ["verify", *map(str, words), "--json"])
        return result.exit_code, [json.loads(line)["verdict"] for line in result.stdout.splitlines()]

    folder, good = tmp_path / "all", recorded.path
    folder.mkdir()
    empty = record_gru(tmp_path / "empty", make_gru(), [0]).path.rename(folder / "b.rec")
    assert typed(folder) == (2, ["empty"])
    assert typed(good, folder) == (0, ["exact", "empty"])
    forger = Forger(empty, folder / "d.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], frames=4)
    assert typed(good, forger.path) == (1, ["exact", "mismatch"]), "its frames are missing"
    (folder / "c.instep").write_text("hello " * 1000)
    assert typed(good, empty, folder / "c.instep") == (2, ["exact", "empty", "not checked"])


def test_folders_without_recordings(tmp_path: Path) -> None:
    empty = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert empty.exit_code == 2
    assert (
        empty.stdout
        == f"not checked: {tmp_path} holds no recordings: no file there is named *.instep or begins as one\n"
    )
    in_json = CliRunner().invoke(app, ["verify", str(tmp_path / "a.rec"), str(tmp_path), "--json"])
    found = [json.loads(line)["file"] for line in in_json.stdout.splitlines()]
    assert (in_json.exit_code, found) == (2, [str(tmp_path / "a.rec"), str(tmp_path)])
