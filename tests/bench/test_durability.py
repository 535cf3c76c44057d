"""The measurement measures: its parts are right, whatever the numbers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from instep.bench import durability, load


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "SECONDS", 0.02)
    monkeypatch.setattr(durability, "ROUNDS", 1)


def test_it_ends_with_a_verdict_that_is_its_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = durability.run(Console(stderr=True), tmp_path, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert status == (0 if result["passed"] else 1)
    assert result["streams_with_wrong_state"] == 0
    rates = result["frames_per_s"]
    assert list(rates) == ["none", "memory", "commit", "fsync"]
    for way, rate in rates.items():
        assert result["over_memory"][way] == pytest.approx(rate / rates["memory"], abs=0.001)
        assert result["over_none"][way] == pytest.approx(rate / rates["none"], abs=0.001)
    assert result["missed"] == [way for way in ("commit", "fsync") if result["over_memory"][way] < durability.BARS[way]]
    assert result["folder"] == str(tmp_path)
    assert result["fsync_ms"] > 0
    assert list(tmp_path.iterdir()) == []  # the recordings are gone


@pytest.mark.parametrize(
    ("bar", "status", "said"),
    [
        (0.7, 0, "commit: 0.70 of memory's, at least 0.7 is asked for: reached"),
        (0.71, 1, "commit: 0.70 of memory's, at least 0.71 is asked for: NOT reached"),
    ],
)
def test_the_bars_decide(
    bar: float, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"none": [120.0], "memory": [100.0], "commit": [70.0, 10.0, 90.0], "fsync": [50.0]}
    monkeypatch.setattr(durability, "measure", lambda folder, advance: durability.Samples(rates, [1.0]))
    monkeypatch.setattr(durability, "BARS", {"commit": bar, "fsync": 0.0})
    assert durability.run(Console(width=250)) == status
    assert said in capsys.readouterr().out


def test_a_wrong_output_fails_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = load.state_after
    monkeypatch.setattr(durability, "WAYS", ("none", "memory"))
    monkeypatch.setattr(durability, "BARS", {"memory": 0.0})
    monkeypatch.setattr(load, "state_after", lambda *arguments: right(*arguments) + 1.0)
    assert durability.run(Console(width=250)) == 1
    assert f"{2 * load.STREAMS} streams with a wrong final state" in capsys.readouterr().out


def test_the_recordings_are_those_of_the_durability(tmp_path: Path) -> None:
    commands = {way: durability._server(tmp_path, way)._command for way in durability.WAYS}
    assert "--record" not in commands["none"]
    for way in ("memory", "commit", "fsync"):
        assert commands[way][-4:] == ["--record", str(tmp_path / f"{way}.db"), "--durability", way]
