"""A program on a terminal of its own, and what that terminal shows."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from tests.support.warm import WarmProcess

WAIT_S: Final = 60.0


class TerminalProgram:
    """Collects what a program writes; knows its newest screen, provided that each begins at the upper left corner."""

    def __init__(self, process: WarmProcess, terminal: int, first_settings: list[Any]) -> None:
        self.process = process
        self.terminal = terminal
        self.first_settings = first_settings
        """Of the terminal, before the program ran."""
        self.written = ""
        self._arrived = asyncio.Event()

    @property
    def settings(self) -> list[Any]:
        """Of the terminal now."""
        return termios.tcgetattr(self.terminal)

    @property
    def screen(self) -> list[str]:
        """The lines of the newest whole screen, without their styles."""
        screens = self.written.split("\x1b[H")
        newest = screens[-1] if self.process.poll() is not None or len(screens) < 3 else screens[-2]
        return [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", newest).split("\r\n")]

    @property
    def text(self) -> str:
        """The newest whole screen."""
        return "\n".join(self.screen)

    async def until(self, *found: str) -> list[str]:
        """Wait until all of these are on the screen; its lines."""
        async with asyncio.timeout(WAIT_S):
            while not all(text in self.text for text in found):
                self._arrived.clear()
                await self._arrived.wait()
        return self.screen

    async def type(self, keys: str, *found: str) -> list[str]:
        """Press keys, and wait until all of these are on the screen."""
        os.write(self.terminal, keys.encode())
        return await self.until(*found)

    def resize(self, width: int, height: int) -> None:
        """Give the terminal another size, and say so as terminals do."""
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    async def end(self) -> int:
        """Wait for the end of the program; its exit status."""
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), WAIT_S)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the program has ended
            self.written += os.read(self.terminal, 65_536).decode(errors="replace")
        self._arrived.set()


@contextlib.asynccontextmanager
async def on_terminal(command: Sequence[str], width: int = 80, height: int = 24) -> AsyncIterator[TerminalProgram]:
    """Run a Python module with arguments on a terminal of that size while the block runs.

    The terminal's settings must be the same at the program's end as at its start.
    """
    terminal, program = pty.openpty()
    before = termios.tcgetattr(program)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    running = TerminalProgram(_start(command, program), terminal, before)
    loop = asyncio.get_running_loop()
    loop.add_reader(terminal, running._read)
    try:
        yield running
        assert running.process.poll() is not None, "it still runs"
        assert running.settings == before
    finally:
        loop.remove_reader(terminal)
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        os.close(terminal)
        os.close(program)


def _start(command: Sequence[str], terminal: int) -> WarmProcess:
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    return WarmProcess(command[1:], program=command[0], env=environment, output=terminal)
