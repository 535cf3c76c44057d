from __future__ import annotations

import io
import re

import numpy as np
from rich.console import Console

from instep.verify.render import render
from instep.verify.report import Report, ulp_bins
from tests.verify.test_report import report, stream


def text_of(found: Report, width: int = 100, color: bool = False) -> str:
    file = io.StringIO()
    render(found, Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None))
    return file.getvalue()


def test_long_recordings_show_the_first_streams_and_all_that_are_wrong() -> None:
    streams = [stream(number, "mismatch" if number in (30, 77) else "exact") for number in range(1, 101)]
    text = text_of(report(*streams))
    shown = [line.split("│")[5].strip() for line in text.splitlines() if "mic-" in line and "│" in line]
    assert shown == [f"mic-{number}" for number in (*range(1, 21), 30, 77)]
    assert "100 streams" in text
    assert "and 78 more without a mismatch" in text
    assert "first mismatch: stream 30 (mic-30): frame 3 is missing" in text
    assert text.splitlines()[-1] == report(*streams).summary()


def test_the_last_line_is_the_summary_in_one_piece_and_green_only_when_all_matched() -> None:
    good, bad = report(stream(1, "exact")), report(stream(1, "mismatch"))
    assert text_of(good, width=30).splitlines()[-1] == good.summary()
    assert "\x1b[1;32mverified" in text_of(good, color=True)
    assert "\x1b[1;31mnot verified" in text_of(bad, color=True)


def test_histogram_of_distances() -> None:
    stepped, whole = ulp_bins(np.array([0] * 1000 + [3])), ulp_bins(np.array([0] * 1000 + [2, 2]))
    lines = text_of(report(stream(1, "exact"), ulps={"stepped": stepped, "whole sequence": whole})).splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "█" in line]
    assert [row[:3] for row in rows] == [["0", "1,000", "1,000"], ["2", "0", "2"], ["3–4", "1", "0"]]
    bars = [len(row[3]) for row in rows]
    assert bars[0] == 40
    assert bars[0] > bars[1] > bars[2] > 0


def test_why_it_says_less_than_exact_is_said() -> None:
    text = text_of(report(stream(1, "within tolerance"), notes=("torch 2.4 there, 2.5 here",), finished=False))
    assert "bits were not required to be equal: torch 2.4 there, 2.5 here" in text
    assert "the recording was not closed: it was checked up to its last commit" in text


def test_one_stream_is_not_many() -> None:
    assert " 1 stream\n" in re.sub(r" +\n", "\n", text_of(report(stream(1, "exact"))))


def test_names_are_only_names() -> None:
    text = text_of(report(stream(1, "exact"), stream(2, "mismatch", problems=("[bold]odd[/bold]",))))
    assert "[bold]odd[/bold]" in text
