"""One command for all rows: which are run, what is said of them, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from instep.bench import suite
from instep.bench.choice import NAMES, NoSuchRow, chosen
from instep.bench.connection import Refused
from instep.bench.reference import WrongOutput
from instep.bench.result import Row
from instep.bench.rounds import Run
from instep.bench.suite import MEASUREMENTS, Measurement


def row(name: str, value: float, problem: str = "") -> Row:
    samples = {"a, frames/s": [value, value]}
    return Row(name, f"what {name} is", "×", value, 1.0, "at least", samples, {"model": "GRU 3→4"}, problem)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Three rows, of which the third does not reach its bar."""
    seen: list[Run] = []

    def measure(*rows: Row) -> Measurement:
        def measured(run: Run) -> list[Row]:
            seen.append(run)
            run.advance()
            return list(rows)

        return Measurement(tuple(row.name for row in rows), measured)

    measurements = (measure(row("one", 2.0), row("two", 1.0)), measure(row("three", 0.5)))
    monkeypatch.setattr(suite, "MEASUREMENTS", measurements)
    return seen


def test_every_row_is_measured_once() -> None:
    assert tuple(name for measurement in MEASUREMENTS for name in measurement.rows) == NAMES
    assert len(set(NAMES)) == len(NAMES)


def test_some_rows_are_chosen_by_name_and_come_in_the_suites_order() -> None:
    assert chosen(None) == NAMES
    assert chosen("start, blocks-bare") == ("blocks-bare", "start")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("block-bare", "there is no row 'block-bare'; did you mean blocks-bare?"),
        ("start,onestream", "there is no row 'onestream'; did you mean one-stream?"),
        ("zzzz", f"there is no row 'zzzz'; there are {', '.join(NAMES)}"),
        ("", f"there is no row ''; there are {', '.join(NAMES)}"),
    ],
)
def test_a_typo_is_told_what_was_meant(text: str, sentence: str) -> None:
    with pytest.raises(NoSuchRow) as error:
        chosen(text)
    assert str(error.value) == sentence


def test_json_files_and_status(runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    status = suite.run(Console(stderr=True), rows=("one", "two", "three"), out=out, as_json=True)
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert status == 1
    assert list(result) == ["started", "machine", "load_average", "quick", "rows", "missed", "passed"]
    assert [each["name"] for each in result["rows"]] == ["one", "two", "three"]
    assert [each["reached"] for each in result["rows"]] == [True, True, False]
    assert (result["missed"], result["passed"], result["quick"]) == (["three"], False, False)
    assert set(result["machine"]["versions"]) >= {"torch", "pyzmq", "libzmq", "numpy", "msgpack", "python"}
    assert result["machine"]["threads"] == {"torch_of_engine": 1, "torch_of_bare_loops": 1, "producers": 1}
    assert set(result["load_average"]) == {"before", "after"}
    assert json.loads((out / "bench.json").read_text()) == result
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [(run.rounds, run.scale) for run in runs] == [(7, 1), (7, 1)]
    assert not runs[0].folder.exists()


def test_only_the_rows_that_were_asked_for_count(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.run(Console(width=200), rows=("two",)) == 0
    said = capsys.readouterr().out
    assert len(runs) == 1
    assert "two: 1×, at least 1×: reached (a, frames/s 1)" in said
    assert "what one is" not in said
    assert "1 reached" in said


def test_the_table_says_what_where_and_how_it_ended(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.run(Console(width=250), rows=("one", "two", "three")) == 1
    said = capsys.readouterr().out
    table = {line.split("│")[1].strip(): line for line in said.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in table["three"].split("│")[2:6]] == [
        "what three is",
        "0.5×",
        "at least 1×",
        "NOT reached",
    ]
    assert "GRU 3→4" in said
    assert "1 torch thread in the engine" in said
    assert "1 of 3 rows did not reach their bar: three" in said


def test_quick_is_no_verdict(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.run(Console(width=200), rows=("one", "three"), quick=True) == 0
    said = capsys.readouterr().out
    assert "too short and loads too small for a verdict" in said
    assert "three: 0.5×, at least 1×: no verdict" in said
    assert "reach" not in said
    assert (runs[0].rounds, runs[0].seconds, runs[0].scale) == (1, 0.05, 50)


def test_quick_is_no_verdict_in_files_either(runs: list[Run], tmp_path: Path) -> None:
    assert suite.run(Console(width=200), rows=("one", "three"), quick=True, out=tmp_path) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["quick"], result["passed"], result["missed"]) == (True, None, None)
    assert {(row["reached"], row["verdict"]) for row in result["rows"]} == {(None, "no verdict")}
    assert "three" in {row["name"] for row in result["rows"]}


@pytest.mark.parametrize("error", [WrongOutput("3 of 8 streams differ"), Refused("the server's queue is full")])
def test_what_was_wrong_or_refused_fails_the_run(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(run: Run) -> list[Row]:
        raise error

    monkeypatch.setattr(suite, "MEASUREMENTS", (Measurement(("one",), measure),))
    assert suite.run(Console(width=200), rows=("one",), out=tmp_path / "out") == 1
    assert f"not measured: {error}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
