from __future__ import annotations

import asyncio
import io
import re

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from instep.demo.producers import Heard
from instep.demo.show import accuracy_table, say, speed_table, streaming
from instep_tools import terminal as terminal_module

SPEAKERS = np.zeros(2, np.int32)


def half_heard() -> Heard:
    heard = Heard([2, 2], outputs=3)
    heard.add(0, np.eye(3, dtype=np.float32)[[1, 0]], np.array([0.001, 0.003]))
    heard.add(1, np.eye(3, dtype=np.float32)[[2]], np.array([0.002]))
    return heard


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIET_S", "DRAW_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0)


async def shown_by_progress(terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    async with streaming(console, half_heard(), SPEAKERS):
        while "correct" not in file.getvalue():
            await asyncio.sleep(0)
    return file.getvalue()


async def test_progress_is_live_on_a_terminal(at_once: None) -> None:
    shown = await shown_by_progress(terminal=True)
    assert "3/4 frames · 1 stream finished · 50.0% correct" in re.sub(r"\x1b\[[\d;]*m", "", shown)


async def test_a_pipe_gets_lines_of_progress(at_once: None) -> None:
    shown = await shown_by_progress(terminal=False)
    assert set(shown.splitlines()) == {"streaming 3/4 frames · 1 stream finished · 50.0% correct"}


async def test_progress_has_no_share_before_the_first_decision(at_once: None) -> None:
    console = Console(file=(file := io.StringIO()), width=80)
    async with streaming(console, Heard([2, 2], outputs=3), SPEAKERS):
        while "\n" not in file.getvalue():
            await asyncio.sleep(0)
    assert set(file.getvalue().splitlines()) == {"streaming 0/4 frames · 0 streams finished"}


def rows(table: Table) -> list[list[str]]:
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return [line.split() for line in file.getvalue().splitlines()]


def test_accuracy_by_frames_heard() -> None:
    right = np.zeros((4, 12), np.bool_)
    right[0] = True
    right[1, 2:] = True
    right[2, 6:] = True
    right[3, 10] = True
    shown = rows(accuracy_table(right))
    assert ["heard", "1", "2", "3", "5", "7", "10", "all"] in shown
    assert ["correct", "1", "1", "2", "2", "3", "3", "3"] in shown
    assert ["accuracy", "25.0%", "25.0%", "50.0%", "50.0%", "75.0%", "75.0%", "75.0%"] in shown


def test_throughput_and_latency() -> None:
    heard = half_heard()
    heard.add(1, np.eye(3, dtype=np.float32)[[0]], np.array([0.1]))
    shown = rows(speed_table(heard, 0.5, {"batch_size_mean": 1.25}))
    assert ["4", "0.5", "8", "1.2", "2.5", "97.1", "100.0"] in shown


def test_what_is_said_is_not_markup() -> None:
    file = io.StringIO()
    say(Console(file=file, width=10), "a [red]long[/] sentence of 12 words", "bold")
    assert file.getvalue() == "a [red]long[/] sentence of 12 words\n"
