"""The command: which rows it runs, its output, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.connection import NotServed
from benchmarks.measurement import Bench, Row
from benchmarks.reference import LeftOut, WrongOutput
from benchmarks.report import machine
from instep.demo.child_server import ChildFailed
from tests.support.pages import read_page


def row(name: str, value: float, threshold: float | None = 1.0) -> Row:
    return Row(name, f"what {name} is", "GRU 3→4", "×", value, threshold, {"a": [value, value]})


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> list[Bench]:
    """Three rows from two measurements, the last of which misses its threshold, and a separate one."""
    seen: list[Bench] = []

    def one(bench: Bench) -> list[Row]:
        seen.append(bench)
        return [row("one", 1.0), row("information", 0.1, None)]

    def two(bench: Bench) -> list[Row]:
        seen.append(bench)
        return [row("two", 0.5)]

    monkeypatch.setattr(command, "MEASUREMENTS", {"one": one, "two": two})
    monkeypatch.setattr(command, "SEPARATE", {"apart": lambda bench: [row("apart", 2.0)]})
    return seen


def test_all_but_the_separate_rows_run_and_json_holds_them(
    benches: list[Bench], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--json"]) == 1
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert [(each["name"], each["reached"]) for each in result["rows"]] == [
        ("one", True),
        ("information", None),
        ("two", False),
    ]
    assert (result["missed"], result["passed"], result["quick"]) == (["two"], False, False)
    assert result["machine"]["processor"]
    assert set(result["machine"]["versions"]) >= {"torch", "pyzmq", "libzmq", "numpy", "msgpack", "python"}
    assert [(bench.rounds, bench.scale) for bench in benches] == [(7, 1), (7, 1)]
    assert not benches[0].folder.exists()
    assert "two: what two is: 0.5×, at least 1×, missed (a 0.5)" in said.err


def test_only_the_rows_that_were_named_run_and_count(benches: list[Bench], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["one", "apart"]) == 0
    said = capsys.readouterr().out
    assert len(benches) == 1
    assert "apart: what apart is: 2×" in said
    assert "every threshold was reached" in said
    assert machine()["processor"] in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "instead"), [("tow", "did you mean 'two'?"), ("seventeen", "there are one, two, apart")]
)
def test_an_unknown_row_is_refused_with_the_names_that_exist(
    benches: list[Bench], capsys: pytest.CaptureFixture[str], name: str, instead: str
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        command.main([name])
    assert exit_status.value.code == 2
    assert f"there is no row {name!r}; {instead}" in capsys.readouterr().err


def test_a_users_model_gets_no_verdict_and_rows_that_make_no_sense_are_left_out(
    benches: list[Bench], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def leave_out(bench: Bench) -> list[Row]:
        raise LeftOut("it is too large")

    monkeypatch.setattr(command, "SEPARATE", {"large": leave_out})
    assert command.main(["--model", str(tmp_path), "--json", "one", "two", "large"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert [bench.model for bench in benches] == [tmp_path, tmp_path]
    assert {each["reached"] for each in result["rows"]} == {None}
    assert (result["missed"], result["passed"], result["left_out"]) == ([], None, {"large": "it is too large"})
    assert "large: left out: it is too large" in said.err
    assert all(len(line) <= 80 for line in said.err.splitlines())
    assert command.main(["--model", str(tmp_path), "large"]) == 1, "nothing was measured"


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", str(tmp_path / "absent"), "start"]) == 1
    assert "there is no model folder" in " ".join(capsys.readouterr().out.split())


def test_quick_gives_no_verdict(benches: list[Bench], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["quick"], result["passed"], result["missed"]) == (True, None, [])
    assert {each["reached"] for each in result["rows"]} == {None}
    assert "too small for a verdict" in said.err
    assert "missed" not in said.err
    assert (benches[0].rounds, benches[0].seconds, benches[0].scale) == (1, 0.05, 50)


@pytest.mark.parametrize("error", [WrongOutput("3 streams differ"), NotServed("busy"), ChildFailed("it ended")])
def test_a_wrong_output_or_a_refusal_fails_the_run(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(bench: Bench) -> list[Row]:
        raise error

    monkeypatch.setattr(command, "MEASUREMENTS", {"one": fail})
    assert command.main([]) == 1
    assert f"not measured: {error}" in capsys.readouterr().out


def test_the_page_says_what_the_json_says(
    benches: list[Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.html"
    assert command.main(["--json", "--report", str(file)]) == 1
    result, page = json.loads(capsys.readouterr().out), read_page(file)
    assert page.verdict == f"{len(result['missed'])} of 2 thresholds missed"
    verdicts = {True: "reached", False: "missed", None: "information"}
    assert [(each["row"], each["measured"], each["verdict"]) for each in page.table("row", "what is compared")] == [
        (each["name"], f"{each['value']:g}×", verdicts[each["reached"]]) for each in result["rows"]
    ]
    assert [each["median"] for each in page.table("row", "side")] == ["1", "0.1", "0.5"]
    assert page.tags["svg"] == 1
    assert "0.5×, at least 1×" in page.pictures
    assert result["machine"]["processor"] in page.facts["machine"]
    assert f"{result['load_average']['before']} before" in page.facts["load average"]
    assert command.main(["--quick", "one", "--report", str(file)]) == 0
    assert read_page(file).verdict.startswith("No verdict")
    seen = len(benches)
    assert command.main(["one", "--report", str(tmp_path / "absent" / "a.html")]) == 1
    assert "there is no folder" in " ".join(capsys.readouterr().out.split())
    assert len(benches) == seen, "nothing was measured"
