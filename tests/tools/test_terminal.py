from __future__ import annotations

import asyncio
import io
import math
import os
import sys

import pytest
from rich.console import Console
from rich.text import Text

from instep_tools import terminal as terminal_module
from instep_tools.terminal import Terminal, progress
from tests.tools.helpers import RememberingTerminal


@pytest.mark.parametrize(("total", "line"), [(20.0, "working 7/20 frames · "), (math.inf, "working 7 frames · ")])
async def test_progress_in_a_file_is_lines(monkeypatch: pytest.MonkeyPatch, total: float, line: str) -> None:
    for name in ("QUIET_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0.01)
    terminal = RememberingTerminal()
    with progress(terminal.err, "working", total, "frames", lambda: 7.0):
        while terminal.complained.count("\n") < 3:
            await asyncio.sleep(0)
    assert terminal.complained.startswith(line)


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


def test_when_nobody_reads_writing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        terminal = Terminal()
        assert not terminal.write("text")
        assert terminal.write("more text")
        pipe.flush()
    with pytest.raises(BrokenPipeError):
        terminal.check_read()
