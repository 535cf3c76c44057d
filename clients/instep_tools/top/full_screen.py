"""The whole terminal for one view: another screen, keys as they are pressed, and everything as before at the end."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text


class FullScreen:
    """To be used in a `with` block within an event loop, in the main thread.

    `draw` gives the lines for a width and a height, `press` is given what was typed, and `end` is called by SIGTERM,
    and when the terminal is gone.
    """

    def __init__(
        self,
        console: Console,
        draw: Callable[[int, int], list[Text]],
        press: Callable[[str], None],
        end: Callable[[], None],
    ) -> None:
        self._console = console
        self._draw = draw
        self._press = press
        self._end = end
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[Any] = []

    @staticmethod
    def is_possible(console: Console) -> bool:
        """Whether there is a terminal to draw on and to read keys from."""
        return console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty() and sys.stdout.isatty()

    def refresh(self) -> None:
        """Draw again."""
        lines = self._draw(*self._console.size)
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        self._live.update(Group(*lines), refresh=True)

    def __enter__(self) -> FullScreen:
        self._before = termios.tcgetattr(0)
        self._take()
        loop = asyncio.get_running_loop()
        loop.add_reader(0, self._read)
        loop.add_signal_handler(signal.SIGWINCH, self.refresh)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        loop.add_signal_handler(signal.SIGTERM, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(0)
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGTERM):
            loop.remove_signal_handler(number)
        self._give_back()

    def _take(self) -> None:
        tty.setcbreak(0)
        self._live.start()

    def _give_back(self) -> None:
        self._live.stop()
        termios.tcsetattr(0, termios.TCSAFLUSH, self._before)

    def _suspend(self) -> None:
        """Ctrl-Z: the shell gets its terminal as it was, until the command continues."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        self.refresh()

    def _read(self) -> None:
        try:
            typed = os.read(0, 4096)
        except OSError:
            typed = b""
        if typed:
            self._press(self._decoder.decode(typed))
        else:  # the terminal is gone
            asyncio.get_running_loop().remove_reader(0)
            self._end()
