"""The arithmetic of rows, and what they say of it, with numbers that were made up."""

from __future__ import annotations

import numpy as np
import pytest

from instep.bench.result import Direction, Row, ratio
from instep.bench.rows import one_stream, paced, start
from instep.bench.show import line, value


def row(number: float, bar: float, direction: Direction, problem: str = "") -> Row:
    return Row("name", "what", "×", number, bar, direction, {"a": [1.0, 3.0, 2.0]}, problem=problem)


@pytest.mark.parametrize(
    ("number", "direction", "reached", "over_bar"),
    [
        (0.85, "at least", True, 1.0),
        (0.8499, "at least", False, 0.99988),
        (1.7, "at least", True, 2.0),
        (0.85, "at most", True, 1.0),
        (0.8501, "at most", False, 0.99988),
        (0.425, "at most", True, 2.0),
    ],
)
def test_the_bar_decides(number: float, direction: Direction, reached: bool, over_bar: float) -> None:
    judged = row(number, 0.85, direction)
    assert judged.reached is reached
    assert judged.verdict == ("reached" if reached else "NOT reached")
    assert judged.over_bar == pytest.approx(over_bar, abs=1e-5)


def test_a_problem_counts_whatever_the_value() -> None:
    judged = row(1.0, 2.0, "at most", "machine too noisy")
    assert not judged.reached
    assert judged.verdict == "NOT reached: machine too noisy"


def test_a_ratio_is_one_of_medians() -> None:
    samples = {"served": [1.0, 100.0, 6.0], "bare": [2.0, 3.0, 1000.0]}
    assert ratio(samples, "served", "bare") == 2.0
    assert ratio(samples, "bare", "served") == 0.5


def test_json_says_all_of_it() -> None:
    fields = row(2.123456789, 2.0, "at least").as_json()
    assert fields == {
        "name": "name",
        "what": "what",
        "unit": "×",
        "value": 2.1235,
        "bar": 2.0,
        "direction": "at least",
        "samples": {"a": [1.0, 3.0, 2.0]},
        "medians": {"a": 2.0},
        "details": {},
        "problem": "",
        "reached": True,
        "verdict": "reached",
    }


def test_one_stream_is_held_against_the_echo_and_a_step() -> None:
    samples = {one_stream.SERVED: [300.0, 250.0, 100.0], one_stream.ECHO: [90.0], one_stream.STEP: [35.0]}
    judged = one_stream.row(samples, "GRU")
    assert judged.value == 2.0
    assert judged.reached


@pytest.mark.parametrize(
    ("served_ms", "echo_ms", "verdict"),
    [
        (2.0, 0.49, "reached"),
        (2.01, 0.49, "NOT reached"),
        (1.0, 0.5, "NOT reached: machine too noisy, the bare echo's p99 is 0.50 ms, not below 0.5 ms"),
    ],
)
def test_paced_counts_only_where_the_echo_is_in_time(served_ms: float, echo_ms: float, verdict: str) -> None:
    judged = paced.row({paced.SERVED: [9.0, served_ms, 0.1], paced.ECHO: [echo_ms]}, "GRU")
    assert judged.verdict == verdict
    assert judged.value == served_ms


@pytest.mark.parametrize(
    ("ready_s", "certified_s", "verdict"),
    [
        (4.0, 1.0, "reached"),
        (4.1, 0.1, "NOT reached"),
        (3.0, 1.1, "NOT reached: certification took 1.10 s, more than 1 s"),
    ],
)
def test_start_has_two_bars(ready_s: float, certified_s: float, verdict: str) -> None:
    assert start.row({start.READY: [ready_s], start.CERTIFIED: [certified_s]}, "GRU").verdict == verdict


def test_percentiles_are_in_the_units_they_name() -> None:
    assert one_stream.p50_us(np.array([0.001, 0.002, 0.005])) == pytest.approx(2000)
    assert paced.p99_ms(np.linspace(0, 0.1, 101)) == pytest.approx(99)


def test_numbers_are_read_with_their_units() -> None:
    assert [value(0.85, "×"), value(189.2, "bytes"), value(15, "×"), value(1.2345, "s")] == [
        "0.85×",
        "189 bytes",
        "15×",
        "1.23 s",
    ]
    missed = row(0.5, 0.85, "at least")
    assert line(missed, is_judged=True) == "name: 0.5×, at least 0.85×: [red]NOT reached[/] (a 2)"
    assert line(missed, is_judged=False) == "name: 0.5×, at least 0.85×: [yellow]no verdict[/] (a 2)"
