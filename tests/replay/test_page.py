"""`instep verify --report`: the page says what the JSON of the same run says, and changes no exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instep.program import app
from instep.recording.writer import RecordingWriter
from instep.replay.rendering import verify_page
from instep.replay.report import Report, StreamReport
from instep_tools.page import MOST_ROWS, write_page
from tests.support.forger import Forger
from tests.support.pages import ReadPage, read_page
from tests.support.recordings import Recorded, gru_step, make_gru, record_gru
from tests.support.scribe import Scribe

NAME = "<img src=x onerror=alert(1)>\x1b[31m"


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def reported(file: Path, page: Path) -> tuple[int, dict[str, Any], ReadPage]:
    """Exit status, JSON and page of one run; the status without the page is the same."""
    result = verify(file, "--json", "--report", page)
    assert result.exit_code == verify(file, "--json").exit_code
    return result.exit_code, json.loads(result.stdout), read_page(page)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path, make_gru(), [5, 0, 9, 40], initial=(2,))


def check_numbers(values: dict[str, Any], page: ReadPage) -> None:
    """The page says the same as the JSON."""
    assert page.verdict.lower() == f"{'verified' if values['verified'] else 'not verified'}: {values['verdict']}"
    assert page.text["p"][2].startswith(f"{values['summary'].capitalize()}. ")
    rows = {row["stream"]: row for row in page.table("stream", "name", "frames")}
    for stream in values["streams"]:
        row = rows.pop(str(stream["stream"]))
        assert (row["frames"], row["verdict"]) == (f"{stream['frames']:,}", stream["verdict"])
        assert row["vs. float64"] == f"{stream['max_error']:.1e}"
        assert row["vs. torch"] == f"{stream['max_distance']:.1e}"
    assert rows == {}
    assert page.facts["fingerprint"] == values["fingerprint"]


def test_a_good_recording(recorded: Recorded, tmp_path: Path) -> None:
    status, values, page = reported(recorded.path, tmp_path / "a.html")
    assert status == 0
    check_numbers(values, page)
    assert page.facts["frames"] == "54"
    assert "Mismatches" not in page.text["h2"]
    said = verify(recorded.path, "--report", tmp_path / "a.html").stdout
    assert " ".join(said.split()).endswith(f"0 mismatches report in {tmp_path / 'a.html'}")


def test_a_mismatch_is_on_top_with_what_was_expected_and_recorded(recorded: Recorded, tmp_path: Path) -> None:
    forger = Forger(recorded.path, tmp_path / "forged.rec")
    row = forger.rows("outputs")[-1]
    y = bytearray(row["y"])
    y[0:4] = b"\0\0\x80\x3f"
    forger.change("outputs", row["position"], y=bytes(y))
    status, values, page = reported(forger.path, tmp_path / "a.html")
    assert status == 1
    check_numbers(values, page)
    assert page.text["h2"][0] == "Mismatches"
    problems = [row["problem"] for row in page.table("stream", "name", "problem")]
    (wrong,) = (stream["problems"] for stream in values["streams"] if stream["problems"])
    assert problems == [f"{problem.capitalize()}." for problem in wrong]
    assert page.table("stream", "name", "frames")[0]["verdict"] == "mismatch"


def test_of_several_recordings_each_has_a_part(recorded: Recorded, tmp_path: Path) -> None:
    folder = recorded.path.parent
    forger = Forger(recorded.path, folder / "forged.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], frames=4)
    (folder / "broken.instep").write_text("text")
    result = verify(folder, "--report", tmp_path / "a.html")
    page = read_page(tmp_path / "a.html")
    assert (result.exit_code, page.verdict.lower()) == (1, result.stdout.splitlines()[-2])
    results = [(Path(row["recording"]).name, row["result"].split(":")[0]) for row in page.table("recording", "result")]
    assert sorted(results[:2]) == [("broken.instep", "Not checked"), ("forged.rec", "Not verified")]
    assert results[2:] == [(recorded.path.name, "Verified")]
    for file in (recorded.path, forger.path):
        assert f"Streams of {file.name}" in page.text["h2"]
    assert "Mismatches of forged.rec" in page.text["h2"]


def test_names_are_hostile(tmp_path: Path) -> None:
    shape = record_gru(tmp_path, make_gru(), [1])
    writer = RecordingWriter.create(tmp_path / "hostile.rec", shape.header)
    scribe = Scribe(writer, gru_step(make_gru()))
    scribe.open(1, name=NAME)
    scribe.step([1])
    scribe.close(1)
    writer.close()
    _, _, page = reported(tmp_path / "hostile.rec", tmp_path / "a.html")
    assert page.table("stream", "name", "frames")[0]["name"] == NAME.replace("\x1b", "\\x1b")


def test_a_page_that_cannot_be_written(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = verify(recorded.path, "--report", tmp_path / "absent" / "a.html")
    assert refused.exit_code == 2
    assert "not checked" in refused.stdout
    assert "there is no folder" in " ".join(refused.stdout.split())
    refused = verify(recorded.path, "--report", recorded.path, "--json")
    assert (refused.exit_code, json.loads(refused.stdout)["verified"]) == (2, False)

    def disk_is_full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    lost = verify(recorded.path, "--report", tmp_path / "a.html")
    assert lost.exit_code == 2
    assert "verified: 4 streams, 54 frames, exact, 0 mismatches" in lost.stdout
    assert "No space left on device" in " ".join(lost.stderr.split())


def test_the_page_of_many_streams_is_small_and_begins_with_the_worst(tmp_path: Path) -> None:
    good = [
        StreamReport(number, f"mic-{number}", 100 + number, 0, "exact", max_error=1e-7 * number)
        for number in range(3000)
    ]
    worst = StreamReport(7, "mic-7", 9, 0, "mismatch", [f"problem {number}" for number in range(1000)])
    report = Report(tmp_path / "a", "m", "f", (*good, worst), True, (), 1.0)
    write_page(tmp_path / "a.html", verify_page({report.file: report}, "", {}))
    page = read_page(tmp_path / "a.html")
    rows = page.table("stream", "name", "frames")
    assert len(rows) == MOST_ROWS
    assert (rows[0]["verdict"], rows[1]["name"]) == ("mismatch", "mic-2999")
    assert f"and {3001 - MOST_ROWS:,} more streams, none of which is worse" in page.text["p"]
