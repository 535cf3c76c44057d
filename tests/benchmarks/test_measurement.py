"""The arithmetic of rows, with made-up figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.measurement import Bench, Direction, Row, interleave, ratio
from benchmarks.report import line, value
from benchmarks.rows import one_stream_row, p50_us, p99_ms, paced_row


def row(number: float, threshold: float | None, direction: Direction = "at least") -> Row:
    return Row("name", "what", "GRU 3→4", "×", number, threshold, {"a": [1.0, 3.0, 2.0]}, direction)


def test_sides_alternate_and_the_first_round_does_not_count() -> None:
    measured: list[str] = []

    def side(name: str) -> float:
        measured.append(name)
        return float(len(measured))

    samples = interleave(Bench(Path(), rounds=3), {"a": lambda: side("a"), "b": lambda: side("b")})
    assert "".join(measured) == "baabbaab"
    assert samples == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}
    measured.clear()
    samples = interleave(Bench(Path(), rounds=1, warm_up=0), {"a": lambda: side("a"), "b": lambda: side("b")})
    assert samples == {"a": [1.0], "b": [2.0]}


def test_a_quick_load_is_smaller_but_never_empty() -> None:
    assert Bench(Path()).scaled(1000, 10) == 1000
    assert Bench(Path(), scale=50).scaled(1000, 10) == 20
    assert Bench(Path(), scale=50).scaled(100, 10) == 10


@pytest.mark.parametrize(
    ("number", "direction", "reached"),
    [(0.9, "at least", True), (0.8999, "at least", False), (0.9, "at most", True), (0.9001, "at most", False)],
)
def test_the_threshold_decides(number: float, direction: Direction, reached: bool) -> None:
    assert row(number, 0.9, direction).reached is reached


def test_information_is_neither_reached_nor_missed() -> None:
    assert row(0.5, None).reached is None


def test_a_ratio_compares_medians() -> None:
    samples = {"served": [1.0, 100.0, 6.0], "bare": [2.0, 3.0, 1000.0]}
    assert ratio(samples, "served", "bare") == 2.0
    assert ratio(samples, "bare", "served") == 0.5


def test_json_has_every_sample_and_the_verdict() -> None:
    assert row(2.123456789, 2.0).as_json() == {
        "name": "name",
        "what": "what",
        "model": "GRU 3→4",
        "unit": "×",
        "value": 2.1235,
        "threshold": 2.0,
        "direction": "at least",
        "samples": {"a": [1.0, 3.0, 2.0]},
        "medians": {"a": 2.0},
        "reached": True,
    }


def test_one_stream_is_compared_with_the_echo_and_a_step() -> None:
    judged = one_stream_row({"served": [300.0, 187.5, 100.0], "echo": [90.0], "step": [35.0]}, "GRU")
    assert judged.value == 1.5
    assert judged.reached


@pytest.mark.parametrize(
    ("served_ms", "echo_ms", "threshold_ms", "reached"),
    [(2.0, 0.49, 2.0, True), (2.01, 0.49, 2.0, False), (2.01, 0.51, 2.04, True), (4.1, 1.0, 4.0, False)],
)
def test_the_threshold_of_paced_follows_the_echo_where_the_machine_is_late(
    served_ms: float, echo_ms: float, threshold_ms: float, reached: bool
) -> None:
    judged = paced_row({"served": [9.0, served_ms, 0.1], "echo": [echo_ms]}, "GRU")
    assert judged.value == served_ms
    assert judged.threshold == pytest.approx(threshold_ms)
    assert judged.reached is reached


def test_percentiles_are_in_the_units_that_they_name() -> None:
    assert p50_us(np.array([0.001, 0.002, 0.005])) == pytest.approx(2000)
    assert p99_ms(np.linspace(0, 0.1, 101)) == pytest.approx(99)


def test_a_line_has_the_value_the_threshold_the_verdict_and_the_medians() -> None:
    assert [value(0.85, "×"), value(189.2, "ms"), value(15, "×"), value(1.2345, "s")] == [
        "0.85×",
        "189 ms",
        "15×",
        "1.23 s",
    ]
    missed = row(0.5, 0.9)
    assert line(missed, judged=True) == "name: what: 0.5×, at least 0.9×, [red]missed[/] (a 2)"
    assert line(missed, judged=False) == "name: what: 0.5×, at least 0.9×, [yellow]no verdict[/] (a 2)"
    assert line(row(0.5, None), judged=True) == "name: what: 0.5×, information (a 2)"
