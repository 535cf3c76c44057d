from __future__ import annotations

import json

import pytest
from rich.console import Console

from instep.bench import neighbours


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SECONDS", 0.3)
    monkeypatch.setattr(neighbours, "WARM_UP_S", 0.2)
    monkeypatch.setattr(neighbours, "ROUNDS", 1)


def test_it_measures_every_phase_and_judges(capsys: pytest.CaptureFixture[str]) -> None:
    status = neighbours.run(Console(stderr=True), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert set(result["p99_ms"]) == set(neighbours.PHASES)
    assert min(result["p99_ms"].values()) > 0
    worst = max(result["over_alive"].values())
    assert status == (0 if worst <= neighbours.BAR else 1)


@pytest.mark.parametrize(("bar", "status", "word"), [(1e9, 0, "reached"), (0.0, 1, "NOT reached")])
def test_the_bar_decides(
    bar: float, status: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neighbours, "BAR", bar)
    assert neighbours.run(Console(width=200)) == status
    out = capsys.readouterr().out
    assert f"at most {bar}× is asked for: {word}" in out
    assert all(phase in out for phase in neighbours.PHASES)
