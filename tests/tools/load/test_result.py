"""Numbers, verdicts and files of made-up samples; the truth is numpy's, over every frame."""

from __future__ import annotations

import itertools
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import StepPatch

from instep_tools.load import plot, report, saved
from instep_tools.load.generator import PartResult
from instep_tools.load.plan import LoadPlan, Mode
from instep_tools.load.result import Measured, measured
from instep_tools.load.samples import SAMPLE, as_samples, held_up_us, percentiles
from instep_tools.problems import BadFile, write_file
from instep_tools.stream_plot import rendered
from instep_tools.words import three_digits
from tests.support.small_files import files_of_at_most
from tests.tools.helpers import info_with

PLAN = LoadPlan(
    streams=4,
    connections=1,
    processes=1,
    mode=Mode.OPEN,
    rate_hz=50.0,
    duration_s=10.0,
    warmup_s=1.0,
    block=None,
    steps=1,
)
#        at    latency late  away queue compute send rest held up frames
GOOD: list[tuple[float, ...]] = [
    (0.5, 1000.0, 100.0, 0.0, 300.0, 200.0, 50.0, 350.0, 0.0, 4),
    (9.5, 3000.0, 0.0, 0.0, 500.0, 250.0, 70.0, 2180.0, 0.0, 12),
]


def result(rows: Sequence[tuple[float, ...]], plan: LoadPlan = PLAN, **found: Any) -> Measured:
    return measured(plan, PartResult(np.array(rows, SAMPLE), **found))


def one(latency_us: float, late_us: float = 0.0, held_up_us: float = 0.0, **found: Any) -> Measured:
    rest_us = latency_us - late_us
    return result([(0.5, latency_us, late_us, 0.0, 0.0, 0.0, 0.0, rest_us, held_up_us, 4)], **found)


def test_percentiles_are_numpys_over_every_frame(rng: np.random.Generator) -> None:
    values = rng.exponential(size=500)
    weights = rng.integers(1, 50, 500)
    at = (0.1, 1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0)
    expected = np.percentile(np.repeat(values, weights), at, method="inverted_cdf")
    np.testing.assert_array_equal(percentiles(values, weights, at), expected)
    every = np.arange(1.0, 1001.0)
    assert percentiles(every, np.ones(1000, np.int64), (99.9, 99.0, 50.0)).tolist() == [999, 990, 500], "no rounding"
    assert np.isnan(percentiles(np.empty(0), np.empty(0, np.int64))).all()


def test_samples_are_what_was_collected() -> None:
    rows = [(number / 7, 1.0 * number, *range(7), number) for number in range(50)]
    assert as_samples(array("d", itertools.chain(*rows))).tolist() == rows
    assert as_samples(array("d")).shape == (0,)


def test_how_long_the_load_generator_stood_still_while_a_block_was_on_its_way() -> None:
    """Blocks from 0 to 1 s after they were sent, which is 0.1 s late, and stalls at 0.2 to 0.3 s and 0.6 to 1.6 s."""
    rows = [(at, 1.1e6, 0.1e6, 0, 0, 0, 0, 0, 0, 1) for at in (0.1, 0.25, 1.0, 1.25, 3.0)]
    found = held_up_us(np.array(rows, SAMPLE), [(0.2, 0.3), (0.6, 1.6)])
    np.testing.assert_allclose(found / 1e6, [0, 0.05, 0.5, 0.7, 0], atol=1e-9)
    assert held_up_us(np.array(rows, SAMPLE), []).tolist() == [0] * 5


def test_numbers() -> None:
    found = result(GOOD)
    assert (found.seconds, found.frames_s, found.answers_s) == (10, 1.6, 0.2)
    assert (found.latency.p50, found.latency.max) == (3000, 3000)
    assert (found.parts["queue_us"].p50, found.parts["rest_us"].max) == (500, 2180)
    assert found.whole
    assert found.longest_silence_s == 9.0
    assert result(GOOD[:1]).longest_silence_s == 9.5
    late = (10.5, 9000.0, *[0.0] * 7, 4)
    assert result([*GOOD, late]).frames_s == 1.6, "what came after the end is no throughput"
    assert result([*GOOD, late]).latency.max == 9000
    nan = math.nan
    unanswered = result([*GOOD, (9.0, 80_000.0, 5.0, nan, nan, nan, nan, nan, 0, 4)], unanswered=4)
    assert (unanswered.frames_s, unanswered.latency.max, unanswered.parts["queue_us"].max) == (1.6, 80_000, 500)
    assert not unanswered.whole
    assert report.problems(unanswered) == ", 4 frames unanswered, nothing was answered for 9.0 s"
    assert (result(GOOD[:1], stopped=True).seconds, result(GOOD[:1], stopped=True).frames_s) == (0.5, 8)
    nothing = result([], stopped=True)
    assert (nothing.seconds, nothing.frames_s, nothing.whole) == (0, 0, False)


def test_a_server_that_is_gone() -> None:
    nan = math.nan
    waited = [(8.0, 5.5e6, 10.0, 5.4e6, nan, nan, nan, nan, 0, 4)] * 2
    found = result([GOOD[0], *waited], unanswered=8, lost="it is gone", gaps=[(0.5, 8.0)], gone=1)
    assert report.early_end(found) == "ended after 0.5 of 10 s: it is gone"
    assert re.fullmatch(
        "until then 8 frames/s, 2 answers/s; p50 [^;]+, p99 [^;]+, unanswered frames included", report.numbers(found)
    )
    assert report.problems(found) == ", 8 frames of the 12 due unanswered"
    assert (found.parts["away_us"].p99, "away_us" in found.shown) == (5.4e6, True)
    values = found.as_json()
    assert (values["reconnections"], values["without_connection_s"], values["longest_silence_s"]) == (0, 7.5, 7.5)
    nothing = result(waited, unanswered=8, lost="it is gone")
    assert (report.early_end(nothing), report.numbers(nothing)) == ("nothing was answered: it is gone", "")
    assert rendered(plot.run([nothing], info_with()), Path("a.png")).startswith(b"\x89PNG")


@pytest.mark.parametrize("answers", [400, 3000])
def test_the_picture_of_a_server_that_is_gone_shows_the_loss(answers: int) -> None:
    nan = math.nan
    rows = [(0.5 * number / answers, *GOOD[0][1:]) for number in range(1, answers + 1)]
    rows += [(8.0, 7e6, 10.0, 6.9e6, nan, nan, nan, nan, 0, 4)]
    found = result(rows, unanswered=4, lost="it is gone", gaps=[(0.1, 0.2), (0.5, 8.0)], gone=1)
    figure = plot.run([found], info_with())
    assert "ended after 0.5 of 10 s: it is gone\nuntil then " in figure.get_suptitle()
    over_time = [axes for axes in figure.axes if axes.get_xlabel() == "s"]
    assert len(over_time) == 3
    for axes in over_time:
        assert axes.get_xlim() == (0, 10)
        assert [text.get_position()[0] for text in axes.texts] == pytest.approx([0.15, 5.25])
    (rates,) = (patch for axes in over_time for patch in axes.patches if isinstance(patch, StepPatch))
    values, edges, _ = rates.get_data()
    assert (values[-1], edges[-1] > 9) == (0, True)
    assert rendered(figure, Path("a.png")).startswith(b"\x89PNG")


def test_p999_needs_a_thousand_answers() -> None:
    assert math.isnan(result([GOOD[0]] * 999).latency.p999)
    assert result([GOOD[0]] * 1000).latency.p999 == 1000


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (one(20_000), "met"),
        (one(20_001), "not met"),
        (one(20_000, refused=Counter(BUSY=1)), "not met"),
        (one(20_000, unanswered=1), "not met"),
        (one(30_000, unsent=1), "invalid"),
        (one(30_000, gave_up=True), "not met"),
        (one(22_000, late_us=900), "not met"),  # as late as timers are
        (one(22_000, late_us=1100), "invalid"),  # twice as much, and it would have been met
        (one(22_000, held_up_us=1100), "invalid"),
        (one(30_000, late_us=2000, held_up_us=2000), "not met"),
        (one(90_000, late_us=10_100), "invalid"),  # by half of the level
    ],
)
def test_a_level_is_not_missed_by_the_server_where_this_side_was_late(found: Measured, verdict: str) -> None:
    assert found.verdict(20.0) == verdict


def test_what_was_sent_is_told_from_what_was_only_due() -> None:
    nan = math.nan
    answered = (1.0, 2000, 500, 0, 100, 100, 100, 1200, 300, 6)
    unanswered = (1.0, 2000, 1500, nan, nan, nan, nan, nan, 0, 2)
    unsent = (1.0, 2000, 2000, nan, nan, nan, nan, nan, 0, 2)
    found = result([answered, unanswered, unsent])
    assert found.sent_share == 0.8
    assert result([unsent]).sent_share == result([]).sent_share == 0
    assert result([answered]).own_p99_us == 800


def test_a_load_generator_that_is_too_slow_says_so() -> None:
    assert one(3000, late_us=2000).measured_itself
    assert not one(1000, late_us=900).measured_itself, "less than a millisecond is no finding"
    assert not one(9000, late_us=2000).measured_itself, "nor is less than half of the latency"
    assert one(9000, unsent=1).measured_itself


def test_gaps_of_several_connections_are_one_where_they_overlap() -> None:
    found = result(GOOD, gaps=[(5.0, 6.0), (1.0, 2.5), (2.0, 3.0)])
    assert found.gaps == [(1.0, 3.0), (5.0, 6.0)]
    assert found.away_s == 3.0
    assert report.problems(found) == ", 3 reconnections, 3.0 s without a connection"
    values = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (values["reconnections"], values["without_connection_s"]) == (3, 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "0"), (0.1, "0.100"), (0.01234, "0.0123"), (1.234, "1.23"), (22.36, "22.4"), (22607.2, "22,607")],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text
    assert three_digits(math.nan) == "–"


def test_percentiles_for_hdr_histograms_plotters(rng: np.random.Generator) -> None:
    """Every line is read as they read it, and holds what numpy finds over every frame."""
    latency_us = rng.exponential(5000, size=3000)
    frames = rng.integers(1, 9, 3000)
    rows = [(1.0, us, 0, 0, 0, 0, 0, us, 0, n) for us, n in zip(latency_us, frames, strict=True)]
    every = np.repeat(latency_us, frames) / 1000
    head, blank, *lines = saved.as_hgrm(result(rows)).decode().splitlines()
    assert head.split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    assert blank == ""
    table, footer = [line.split() for line in lines[:-3]], lines[-3:]
    last = table.pop()
    assert [float(cell) for cell in last] == [pytest.approx(every.max(), abs=5e-4), 1, len(every)]
    levels = np.array([float(line[1]) for line in table])
    assert levels[:8] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6])
    assert levels[-1] < 1 < (1 - levels[-1]) * len(every) + 1
    for line, level in zip(table, levels, strict=True):
        expected = np.percentile(every, 100 * level, method="inverted_cdf")
        assert float(line[0]) == pytest.approx(expected, abs=5e-4)
        assert int(line[2]) == (every <= expected).sum()
        assert float(line[3]) == pytest.approx(1 / (1 - level), abs=5e-3)
    found = [float(number) for number in re.findall(r"= *([\d.]+)[,\]]", " ".join(footer))]
    buckets = math.ceil(math.log2(latency_us.max() / 2048)) + 1
    expected_footer = [every.mean(), every.std(), every.max(), len(every), buckets, 2048]
    assert found == pytest.approx(expected_footer, abs=5e-4)
    assert footer[0].startswith("#[Mean    = ")
    assert footer[2].startswith("#[Buckets = ")


def test_pictures_of_few_and_many_answers() -> None:
    signatures = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    many = [(at, 1000 + at, 10, 0, 200, 200, 200, 390, 0, 4) for at in np.arange(0.001, 10, 0.002)]
    with_gap = plot.run([result(many, gaps=[(2.0, 3.0)])], info_with())
    closed = plot.run([result(GOOD[:1], replace(PLAN, mode=Mode.CLOSED))], info_with())
    figures = (plot.run([result(GOOD)], info_with()), with_gap, closed)
    for figure, (suffix, signature) in zip(figures, signatures.items(), strict=True):
        assert rendered(figure, Path(f"a.{suffix}")).startswith(signature)
    lost = [text.get_text() for axes in with_gap.axes for text in axes.texts]
    assert lost.count("no connection") == 3
    for slo_ms, streams, title in (
        (3.0, (1, 2, 4), "at least 4 streams within 3 ms"),
        (2.9, (1, 2, 4), "no number of streams within 2.9 ms"),
        (3.0, (1, 2, 8), "2 streams within 3 ms"),
    ):
        plans = [replace(PLAN, streams=number, slo_ms=slo_ms) for number in streams]
        trials = [result(GOOD, plan) for plan in plans]
        if streams[-1] == 8:
            trials[-1:] = [result(GOOD, plans[-1], refused=Counter(BUSY=1))] * 2
        figure = plot.search(trials, info_with())
        subtitle = figure.get_suptitle().splitlines()[-1]
        assert subtitle.startswith(title)
        assert [text.get_text() for text in figure.axes[0].texts] == [f" {slo_ms:g} ms"]
    assert rendered(figure, Path("a.png")).startswith(signatures["png"])


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_file(file, b"before")
    with files_of_at_most(1000), pytest.raises(BadFile, match=r"result.json cannot be written: File too large"):
        write_file(file, b"after" * 1000)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "before")]
