"""`top` on a terminal: its keys, a server that goes and comes back, and the terminal as it was at the end."""

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
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from psutil import Process

from instep.models.folder import write_model
from instep.server.server import Server
from instep_client import AsyncClient
from tests.support.models import SEED_SIZED, SMALL
from tests.support.running import running
from tests.support.served import WarmServer
from tests.support.warm import WarmProcess
from tests.tools.top.support import ADMIN, TRANSPORTS, endpoint_of

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


LEFT: str = "\x1b[?25h\x1b[?1049l"
"""Shows the cursor and leaves the other screen."""


@asynccontextmanager
async def watched(server: Server, transport: str = "zmq") -> AsyncIterator[TerminalProgram]:
    async with on_terminal(["instep_tools", "top", endpoint_of(server, transport), "--every", "0.2"]) as top:
        await top.until("q quit")
        yield top


def names(screen: list[str]) -> list[str]:
    """The streams of a screen from the top."""
    heading = next(at for at, line in enumerate(screen) if line.startswith("name"))
    return [line.split()[0] for line in screen[heading + 1 : -1] if line]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_keys(transport: str) -> None:
    async with running(replace(SEED_SIZED, name="ears"), replace(SMALL, name="eyes"), http=ADMIN) as server:
        async with AsyncClient(server.endpoint) as client, AsyncClient(server.endpoint, model="eyes") as other:
            for name, frames in (("mic-1", 5), ("mic-2", 30), ("lamp", 7)):
                stream = await client.open(name)
                await stream.step(np.zeros((frames, 3), np.float32))
            await client.resume("lamp", take_over=True)
            await other.open("camera")
            async with watched(server, transport) as top:
                screen = await top.until("model      ears", "3 streams", "mic-2")
                assert names(await top.type("3", "▼next seq")) == ["mic-2", "lamp", "mic-1"]
                assert names(await top.type("3", "▲next seq")) == ["mic-1", "lamp", "mic-2"]
                assert names(await top.type("1", "name▲")) == ["lamp", "mic-1", "mic-2"]
                await top.type("s", "▼rate/s")
                await top.type("S", "name▲")
                await top.type("/mic", "/mic▏")
                screen = await top.type("\r", "2 streams with “mic”")
                assert names(screen) == ["mic-1", "mic-2"]
                await top.type("/x\x1b", "3 streams")
                assert names(await top.type("ff", "0 streams parked")) == []
                await top.type("ff", "3 streams")
                await top.type("?", "Enter ends, Esc clears")
                await top.type("?", "name▲")
                assert names(await top.type("m", "model      eyes", "camera")) == ["camera"]
                await top.type("M", "model      ears", "lamp")
                await top.type("p", "paused")
                await (await client.open("late")).close()
                await top.type("p", "3 streams")
                top.resize(120, 40)
                screen = await top.until("expires")
                async with asyncio.timeout(60):
                    while len(top.screen) != 40:
                        await asyncio.sleep(0.01)
                assert max(map(len, top.screen)) <= 120
                await top.type("\x1b[A", "3 streams")  # an arrow means nothing
                await top.type("qq")  # the second one does not take the first one back
                assert await top.end() == 0
            assert top.written.endswith(LEFT)
            assert "Traceback" not in top.written


@pytest.mark.parametrize("typed", ["", "/mic"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
async def test_signals_leave_the_terminal_as_it_was(number: signal.Signals, status: int, typed: str) -> None:
    async with running(SEED_SIZED) as server, watched(server) as top:
        await top.type(typed, typed)
        top.process.send_signal(number)
        assert await top.end() == status
    assert top.written.endswith(LEFT)


async def test_ctrl_z_gives_the_shell_its_terminal_until_it_continues() -> None:
    async with running(SEED_SIZED) as server, watched(server) as top:
        before = top.settings
        assert before != top.first_settings
        top.process.send_signal(signal.SIGTSTP)
        async with asyncio.timeout(60):
            while Process(top.process.pid).status() != "stopped":
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert top.written.endswith(LEFT)
        assert top.settings == top.first_settings
        top.written = ""
        top.process.send_signal(signal.SIGCONT)
        await top.until("q quit")
        assert top.settings == before
        await top.type("q")
        assert await top.end() == 0


async def test_a_server_that_comes_and_goes_and_comes_back(tmp_path: Path) -> None:
    transport = {"endpoint": f"ipc://{tmp_path}/s"}
    async with on_terminal(["instep_tools", "top", transport["endpoint"], "--every", "0.2"]) as top:
        await top.until("no answer for", "trying again", "? help")
        async with running(SEED_SIZED, transport=transport) as server:
            await top.until("ready, 0 frames/s")
            server.stop()
            await top.until("no answer for", "trying again", "ready, 0 frames/s")
        async with running(SEED_SIZED, transport=transport) as again, AsyncClient(again.endpoint) as client:
            await client.open("back")
            async with asyncio.timeout(60):
                while "no answer" in top.text or "back" not in top.text:
                    await asyncio.sleep(0.01)
            await top.type("q")
            assert await top.end() == 0


async def test_a_server_that_is_stuck_is_said_at_once_and_counted_from_its_last_answer(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    with WarmServer(tmp_path / "model") as server:
        async with on_terminal(["instep_tools", "top", server.endpoint, "--every", "0.2"]) as top:
            await top.until("ready, 0 frames/s")
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await top.until("trying again")
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert re.search(r"no answer for [2-9] s(?!,)", top.written), "before the client gives up"
            assert int(re.findall(r"no answer for (\d+) s, trying", top.written)[0]) >= 5
            async with asyncio.timeout(60):
                while "no answer" in top.text:
                    await asyncio.sleep(0.01)
            await top.type("q")
            assert await top.end() == 0
