from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import threading

import pytest
from rich.console import Console
from rich.text import Text

from instep_tools import terminal as terminal_module
from instep_tools.terminal import Terminal, progress, show_progress
from tests.tools.helpers import RememberingTerminal


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress from the first moment."""
    for name in ("QUIET_S", "DRAW_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0.01)


async def looked_at_three_times(terminal: Terminal, total: float) -> None:
    """Work for as long as it takes to be looked at three times."""
    looked: list[float] = []
    often = threading.Event()

    def done() -> float:
        looked.append(7.0)
        if len(looked) == 3:
            often.set()
        return 7.0

    with progress(terminal.err, "working", total, "frames", done):
        await asyncio.to_thread(often.wait)


@pytest.mark.usefixtures("hasty")
async def test_progress_in_a_file_is_lines() -> None:
    terminal = RememberingTerminal()
    await looked_at_three_times(terminal, 20)
    assert terminal.complained.startswith("working 7/20 frames · 0 s\nworking 7/20")
    terminal = RememberingTerminal()
    await looked_at_three_times(terminal, float("inf"))
    assert terminal.complained.startswith("working 7 frames · 0 s\n")


@pytest.mark.usefixtures("hasty")
async def test_progress_on_a_terminal_is_a_bar() -> None:
    for total, numbers in ((20.0, "7/20"), (float("inf"), "7/?")):
        terminal = RememberingTerminal()
        file = io.StringIO()
        terminal.err = Console(file=file, force_terminal=True, width=100)
        await looked_at_three_times(terminal, total)
        assert "working" in file.getvalue()
        assert numbers in file.getvalue()


@pytest.mark.usefixtures("hasty")
def test_a_share_is_shown_in_percent(capfd: pytest.CaptureFixture[str]) -> None:
    shown = ""
    with show_progress("reading") as show:
        show(0.5)
        while "reading 50/100 % · 0 s" not in shown:
            shown += capfd.readouterr().err


async def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("reading") as show:
        show(1.0)
    assert capsys.readouterr().err == ""
    terminal = RememberingTerminal()
    with progress(terminal.err, "working", 20, "frames", lambda: 0.0):
        async with terminal.waiting("for nothing"):
            await asyncio.sleep(0)
    assert terminal.complained == ""


@pytest.mark.usefixtures("hasty")
async def test_long_waits_are_told_of() -> None:
    terminal = RememberingTerminal()
    async with terminal.waiting("waiting for a server"):
        while not terminal.complained:
            await asyncio.sleep(0)
    assert terminal.complained == "waiting for a server\n"


def test_the_summary_goes_where_no_data_is() -> None:
    plain, as_json, data = RememberingTerminal(), RememberingTerminal(as_json=True), RememberingTerminal()
    data.data_on_stdout = True
    for terminal in (plain, as_json, data):
        terminal.summary("all [good]")
    assert (plain.said, plain.complained) == ("all [good]\n", "")
    assert (as_json.said, as_json.complained) == ("", "all [good]\n")
    assert (data.said, data.complained) == ("", "all [good]\n")


def test_tables_hold_text_as_it_is_and_numbers_at_the_right() -> None:
    terminal = RememberingTerminal()
    terminal.table(("name", "frames"), [("[red]mic", "9"), ("b", "1,024")])
    assert terminal.said.splitlines() == ["name      frames", "[red]mic       9", "b          1,024"]


def test_errors_say_what_they_hold() -> None:
    terminal = RememberingTerminal()
    terminal.error("it must be [1, 2] not [red]")
    terminal.note("a [note]")
    assert terminal.complained == "error: it must be [1, 2] not [red]\na [note]\n"


def test_sentences_are_wrapped_on_a_terminal_and_nowhere_else() -> None:
    long = "one sentence that goes on [and on] " + "and on " * 10 + "until its end"
    for terminal_like in (True, False):
        terminal = Terminal()
        terminal.out = terminal.err = Console(file=(file := io.StringIO()), force_terminal=terminal_like, width=100)
        terminal.out.no_color = True
        for speak in (terminal.note, terminal.error, terminal.say, terminal.summary):
            file.seek(0)
            file.truncate()
            speak(long)
            lines = Text.from_ansi(file.getvalue()).plain.splitlines()
            whole = f"error: {long}" if speak == terminal.error else long
            assert " ".join(line.strip() for line in lines) == whole
            assert (len(lines), max(map(len, lines)) <= 80) == ((2, True) if terminal_like else (1, False))


def test_a_result_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True).result({"a": [1, None]})
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert json.loads(out) == {"a": [1, None]}


def test_when_nobody_reads_writing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        terminal = Terminal()
        assert not terminal.write("text")
        assert terminal.write("more text")
        pipe.flush()
    terminal.out = terminal.err = Console(file=io.StringIO())
    terminal.summary("as much as was read")
    assert terminal.out.file.getvalue() == "", "such a command ends quietly"  # type: ignore[attr-defined]
