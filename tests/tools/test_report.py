from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep_tools.load import Mode, PartResult
from instep_tools.load_plan import LoadPlan
from instep_tools.plot import bin_width_s, plot
from instep_tools.problems import BadFile
from instep_tools.report import (
    Measured,
    as_json,
    measured,
    setting,
    table,
    three_digits,
    trials_table,
    verdict,
)
from instep_tools.samples import SAMPLE
from tests.tools.helpers import RememberingTerminal, info_with

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


def result(rows: list[tuple[float, ...]], **changes: object) -> Measured:
    fields = {"samples": np.array(rows, SAMPLE), **changes}
    return measured(PLAN, PartResult(**fields))  # type: ignore[arg-type]


#        at    late   latency  queue  compute send  frames
GOOD: list[tuple[float, ...]] = [
    (0.5, 100.0, 1000.0, 300.0, 200.0, 50.0, 4),
    (9.5, 0.0, 3000.0, 500.0, 250.0, 70.0, 12),
]


CLOSED = replace(PLAN, mode=Mode.CLOSED)


def test_in_a_closed_loop_nothing_is_due_and_no_rate_was_used() -> None:
    found = measured(CLOSED, PartResult(np.array(GOOD, SAMPLE)))
    assert as_json(found)["load"]["rate_hz"] is None
    assert as_json(result(GOOD))["load"]["rate_hz"] == 50
    for plan, titles in ((PLAN, ["from when it was due", "sent late"]), (CLOSED, ["from when it was sent"])):
        terminal = RememberingTerminal()
        terminal.out.print(table(measured(plan, PartResult(np.array(GOOD, SAMPLE)))))
        assert [
            title for title in ("from when it was due", "sent late", "from when it was sent") if title in terminal.said
        ] == titles


@pytest.mark.parametrize(
    ("rate_hz", "steps", "seconds"), [(50.0, 1, 10.0), (7.0, 1, 10.0), (3.0, 4, 1.0), (33.3, 2, 7.0)]
)
def test_a_steady_load_has_as_many_answers_in_every_bin_of_its_picture(
    rate_hz: float, steps: int, seconds: float
) -> None:
    plan = replace(PLAN, rate_hz=rate_hz, steps=steps, duration_s=seconds)
    at_s = np.arange(0.001, seconds, steps / rate_hz)
    found = measured(plan, PartResult(np.array([(at, 0, 1, 1, 1, 1, 4) for at in at_s], SAMPLE)))
    width = bin_width_s(found)
    whole = int(at_s[-1] / width)
    assert len(set(np.bincount((at_s / width).astype(int))[:whole].tolist())) <= 1
    assert width >= steps / rate_hz or whole == 0
    assert whole <= 120


def test_a_closed_loop_has_bins_of_any_width() -> None:
    assert bin_width_s(measured(CLOSED, PartResult(np.array(GOOD, SAMPLE)))) == pytest.approx(10 / 60)


def test_numbers() -> None:
    found = result(GOOD)
    assert (found.seconds, found.frames_s, found.answers_s) == (10, 1.6, 0.2)
    assert (found.latencies["latency_us"].p50, found.latencies["latency_us"].max) == (3000, 3000)
    assert found.latencies["queue_us"].p50 == 500
    assert found.latencies["rest_us"].max == 3000 - 500 - 250 - 70
    assert found.p99_ms == 3
    assert found.whole


def test_answers_after_the_end_are_no_throughput_but_latency() -> None:
    found = result([*GOOD, (10.5, 0.0, 9000.0, 0.0, 0.0, 0.0, 4)])
    assert found.frames_s == 1.6
    assert found.latencies["latency_us"].max == 9000


def test_unanswered_frames_count_as_latency_alone() -> None:
    found = result([*GOOD, (9.0, math.nan, 80_000.0, math.nan, math.nan, math.nan, 4)], unanswered=4)
    assert found.frames_s == 1.6
    assert found.latencies["latency_us"].max == 80_000
    assert found.latencies["queue_us"].max == 500
    assert not found.whole
    assert verdict(found, 1e9) == "not met"


def test_what_was_stopped_is_measured_up_to_then() -> None:
    found = result(GOOD[:1], stopped=True)
    assert (found.seconds, found.frames_s) == (0.5, 8)
    found = result([], stopped=True)
    assert (found.seconds, found.frames_s, found.answers_s) == (0, 0, 0)
    assert not found.whole


def test_a_level_is_met_by_the_99th_percentile_and_only_without_refusals() -> None:
    assert verdict(result(GOOD), 3.0) == "met"
    assert verdict(result(GOOD), 2.99) == "not met"
    refused = result(GOOD, refused=Counter(BUSY=1))
    assert not refused.whole
    assert verdict(refused, 3.0) == "not met"


def test_a_level_is_not_missed_by_the_server_where_this_side_was_late() -> None:
    late = result([(0.5, 2000.0, 3000.0, 300.0, 200.0, 50.0, 4)])
    assert late.whole
    assert late.measured_itself
    assert (verdict(late, 3.0), verdict(late, 2.9)) == ("met", "invalid")
    little = result([(0.5, 900.0, 1000.0, 10.0, 20.0, 5.0, 4)])
    assert not little.measured_itself, "less than a millisecond is no finding"
    share = result([(0.5, 2000.0, 9000.0, 300.0, 200.0, 50.0, 4)])
    assert not share.measured_itself, "nor is less than half of the latency"
    unsent = result(GOOD, unsent=1)
    assert (unsent.whole, verdict(unsent, 1e9)) == (False, "invalid")


def test_the_longest_gap_reaches_to_the_end() -> None:
    assert result(GOOD).gap_s == 9.0
    assert result(GOOD[:1]).gap_s == 9.5
    assert result([]).gap_s == 10.0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "0.000"), (0.1234, "0.123"), (1.234, "1.23"), (22.36, "22.4"), (22607.2, "22,607")]
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text
    assert three_digits(math.nan) == "–"


def test_the_tables_say_it_all() -> None:
    terminal = RememberingTerminal()
    terminal.out.print(table(result(GOOD)))
    rows = {line.split("  ")[0]: line for line in terminal.said.splitlines()}
    assert rows["latency, from when it was due"].split()[-5:] == ["3.00", "3.00", "3.00", "–", "3.00"]
    assert "server: queue" in terminal.said
    terminal.out.print(trials_table([result(GOOD), result(GOOD, unanswered=1)], 3.0))
    assert "200" in terminal.said
    assert terminal.said.count("not met") == 1
    assert terminal.said.splitlines()[-2].endswith("met    ")
    terminal = RememberingTerminal()
    terminal.out.print(trials_table([result(GOOD, gave_up=True)], 3.0))
    assert "–" in terminal.said.splitlines()[-1]


def test_json_holds_no_nan() -> None:
    values = json.loads(json.dumps(as_json(result(GOOD, refused=Counter(BUSY=3))), allow_nan=False))
    assert values["load"]["mode"] == "open"
    assert values["latency_us"]["latency"]["p99"] == 3000
    assert set(values["latency_us"]) == {"latency", "late", "queue", "compute", "send", "rest"}
    assert values["refused_frames"] == {"BUSY": 3}
    assert as_json(result([]))["latency_us"]["latency"]["p50"] is None


def test_the_setting_names_machine_and_model() -> None:
    assert "model 'halving' (3 to 2) on none, exact" in setting(info_with())
    assert "CPUs, Python 3" in setting(info_with())


@pytest.mark.parametrize("rows", [GOOD, GOOD[:1], GOOD * 500])
def test_a_plot_is_a_picture(tmp_path: Path, rows: list[tuple[float, ...]]) -> None:
    plot(result(rows), tmp_path / "p.png", "title")
    data = (tmp_path / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"p.png cannot be written: No such file"):
        plot(result(GOOD), tmp_path / "absent" / "p.png", "title")
