"""The measurement measures: its parts are right, whatever the numbers are."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from instep.bench import load, throughput


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.02)
    monkeypatch.setattr(throughput, "ROUNDS", 1)


def test_it_ends_with_a_verdict_that_is_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    status = throughput.run(Console(file=None, stderr=True), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert status == (0 if result["passed"] else 1)
    assert result["streams_with_wrong_state"] == 0
    rates = result["frames_per_s"]
    assert result["served_over_seed"] == pytest.approx(rates["served"] / rates["seed"], abs=0.01)
    assert "torch" in result["machine"]


@pytest.mark.parametrize(("bar", "status", "word"), [(0.0, 0, "reached"), (1e9, 1, "NOT reached")])
def test_the_bar_decides(
    bar: float, status: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "BAR_OVER_SEED", bar)
    assert throughput.run(Console(width=200)) == status
    assert f"× the seed's way (bar {bar:g}×, {word})" in capsys.readouterr().out


def test_a_wrong_state_fails_whatever_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = load.state_after
    monkeypatch.setattr(throughput, "BAR_OVER_SEED", 0.0)
    monkeypatch.setattr(load, "state_after", lambda *arguments: right(*arguments) + 1)
    assert throughput.run(Console(width=200)) == 1
    assert f"{load.STREAMS} streams with a wrong final state" in capsys.readouterr().out
