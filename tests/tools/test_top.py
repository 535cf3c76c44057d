"""`instep top`: what it learns of a real server, what it draws, and the terminal as it was at the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import pty
import re
import signal
import struct
import termios
from collections import ChainMap, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from instep.models.folder import write_model
from instep_client import AsyncClient
from instep_client.replies import ListedStream, ServedModel
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.top import SORTS, ScreenView, Snapshot, drawn, top
from tests.support.fake_server import INFO
from tests.support.models import SEED_SIZED, SMALL, plain
from tests.support.running import running
from tests.support.swapping import reload_models
from tests.support.warm import WarmProcess
from tests.tools.helpers import RememberingTerminal

WAIT_S: Final = 60.0
LEFT: Final = "\x1b[?25h\x1b[?1049l"
"""Shows the cursor and leaves the other screen."""


async def as_json(endpoint: str, model: str = "") -> dict[str, Any]:
    terminal = RememberingTerminal(as_json=True)
    assert await top(Target(endpoint, model), terminal, Stop(), every=0.5) == Exit.OK
    return terminal.json()


async def test_json_says_what_was_sent() -> None:
    async with running(replace(SEED_SIZED, name="ears"), replace(SMALL, name="eyes")) as server:
        async with AsyncClient(server.endpoint) as ears, AsyncClient(server.endpoint, model="eyes") as eyes:
            await (await ears.open("mic")).step(np.ones((12, 3), np.float32))
            for name in ("left", "right"):
                await (await eyes.open(name)).step(np.ones((7, 5), np.float32))
            seen, other = await as_json(server.endpoint), await as_json(server.endpoint, "eyes")
            shown = RememberingTerminal()
            assert await top(Target(server.endpoint), shown, Stop(), every=0.1) == Exit.OK  # it is not a terminal
    models = [(model["name"], model["streams"], model["frames"], model["frames_per_s"]) for model in seen["models"]]
    assert models == [("ears", 1, 12, 0), ("eyes", 2, 14, 0)]
    assert (seen["model"]["model"], seen["model"]["fingerprint"]) == ("ears", SEED_SIZED.fingerprint)
    assert (seen["numbers"]["frames_total"], seen["rates"]["frames_total"]) == (12, 0)
    (stream,) = seen["streams"]
    assert (stream["name"], stream["place"], stream["next_seq"], stream["rate"]) == ("mic", "connected", 12, 0)
    assert [(stream["name"], stream["next_seq"]) for stream in other["streams"]] == [("left", 7), ("right", 7)]
    assert "mic" in shown.said


def snapshot(at_s: float, *streams: ListedStream, name: str = "ears", **numbers: float) -> Snapshot:
    known = defaultdict(lambda: math.nan, numbers)
    models = [ServedModel(name, 3, 2, len(streams), 1, int(numbers.get("frames_total", 0)))]
    return Snapshot(at_s, replace(INFO, model=name), models, known, streams)


def stream(name: str, next_seq: int | None, pending: int = 0, idle_s: float = 0.0) -> ListedStream:
    return ListedStream(name, "connected", next_seq, pending, idle_s, None)


def lines(view: ScreenView, width: int = 80) -> list[str]:
    console = Console(file=StringIO(), width=width, record=True, force_terminal=True)
    console.print(drawn(view, 10))
    return console.export_text().splitlines()


def test_rates_are_differences_and_unknown_where_a_counter_began_anew() -> None:
    before = snapshot(10.0, stream("a", 5), stream("b", 9), frames_total=14.0, batches_total=7.0)
    now = snapshot(12.0, stream("a", 25), stream("b", 3), stream("new", 4), frames_total=32.0, batches_total=2.0)
    view = ScreenView("tcp://h:1", now, before)
    assert view.model_rates() == {"ears": 9.0}
    assert view.rates() == {"frames_total": 9.0, "batches_total": pytest.approx(math.nan, nan_ok=True)}
    rates = {each.name: rate for each, rate in view.streams()}
    assert rates == pytest.approx({"a": 10.0, "b": math.nan, "new": math.nan}, nan_ok=True)


def test_streams_are_sorted_by_the_chosen_column_and_then_by_name() -> None:
    streams = (stream("b", 9, 0, 3.0), stream("a", None, 2, 2.0), stream("c", 30, 1, 1.0), stream("d", 9, 0, 0.5))
    before = snapshot(10.0, stream("b", 8), stream("c", 10), stream("d", 8))
    orders = [ScreenView("", snapshot(11.0, *streams), before, sort).streams() for sort in SORTS]
    assert SORTS == ("rate", "name", "next seq", "pending", "idle")
    assert ["".join(each.name for each, _ in order) for order in orders] == ["cbda", "abcd", "cbda", "acbd", "bacd"]
    natural = ScreenView("", snapshot(1.0, *(stream(f"mic-{number}", 0) for number in (10, 9, 1))), sort="name")
    assert [each.name for each, _ in natural.streams()] == ["mic-1", "mic-9", "mic-10"]


def test_numbers_are_where_they_belong() -> None:
    numbers: dict[str, Any] = {"ready": 1, "frames_total": 100, "refused_busy_total": 3, "server_uptime_s": 270_000}
    numbers |= {f"recent_{phase}_us_p50": 1000 * at for at, phase in enumerate(("latency", "queue", "compute"), 1)}
    numbers |= {"verified_frames_total": 90, "verify_mismatches_total": 1, "verify_skipped_frames_total": 0}
    view = ScreenView("ipc:///run/instep", snapshot(2.0, stream("mic", 1234), **numbers), snapshot(1.0, **numbers))
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in lines(replace(view, lost="nobody there"))}
    assert text["instep"].startswith("top ipc:///run/instep up 3d 3h")
    assert text["server"].startswith("ready, 1 stream, 1 connection")
    assert text["p50"] == "ms all 1.00, queue 2.00, compute 3.00, send –"
    assert (text["refused"], text["recording"]) == ("BUSY 3", "off")
    assert text["verified"].startswith("90 frames, 0 not compared, 1 stream differs")
    assert text["mic"] == "connected – 1,234 0 0.0 s never"
    assert text["nobody"] == "there"


@pytest.mark.parametrize(
    "name",
    ["\x1b[2J\x1b]0;title\x07", "a\r\nb\tc", "\u202eright to left", "zero\u200bwidth", "\x9b31mred", "日本語" * 40],
    ids=ascii,
)
def test_no_name_disturbs_the_terminal(name: str) -> None:
    for width in (60, 80, 200):
        shown = lines(ScreenView(name, snapshot(1.0, stream(name, 5), name=name), lost=name), width)
        assert all(char.isprintable() for line in shown for char in line)
        assert max(map(cell_len, shown)) <= width


class TerminalProgram:
    """A program on a terminal; knows its newest screen, provided that each begins at the upper left corner."""

    def __init__(self, process: WarmProcess, terminal: int) -> None:
        self.process = process
        self.terminal = terminal
        self.written = ""

    @property
    def text(self) -> str:
        """The newest whole screen, without its styles."""
        screens = self.written.split("\x1b[H")
        newest = screens[-1] if self.process.poll() is not None or len(screens) < 3 else screens[-2]
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", newest)

    async def until(self, *found: str, absent: str = "\0") -> None:
        async with asyncio.timeout(WAIT_S):
            while absent in self.text or not all(text in self.text for text in found):
                await asyncio.sleep(0.02)

    async def type(self, keys: str, *found: str) -> None:
        os.write(self.terminal, keys.encode())
        await self.until(*found)

    async def end(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), WAIT_S)

    def read(self) -> None:
        with contextlib.suppress(OSError):  # the program has ended
            self.written += os.read(self.terminal, 65_536).decode(errors="replace")


@asynccontextmanager
async def watching(endpoint: str) -> AsyncIterator[TerminalProgram]:
    """`top` on a terminal, whose settings must be the same at its end as at its start."""
    terminal, program = pty.openpty()
    before = termios.tcgetattr(program)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    command = ["top", "--endpoint", endpoint, "--every", "0.2"]
    running = TerminalProgram(WarmProcess(command, env=environment, output=program), terminal)
    asyncio.get_running_loop().add_reader(terminal, running.read)
    try:
        yield running
        assert running.process.poll() is not None, "it still runs"
        assert termios.tcgetattr(program) == before
        async with asyncio.timeout(WAIT_S):  # its last words may not have been read yet
            while not running.written.endswith(LEFT):
                await asyncio.sleep(0.02)
        assert "Traceback" not in running.written
    finally:
        asyncio.get_running_loop().remove_reader(terminal)
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        os.close(terminal)
        os.close(program)


@pytest.mark.parametrize(("number", "status"), [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_keys_sort_and_the_end_leaves_the_terminal_as_it_was(number: signal.Signals | None, status: int) -> None:
    async with running(SEED_SIZED) as server, AsyncClient(server.endpoint) as client:
        for name, frames in (("mic-1", 5), ("mic-2", 30)):
            await (await client.open(name)).step(np.zeros((frames, 3), np.float32))
        async with watching(server.endpoint) as shown:
            await shown.until("ready", "2 streams", "▼rate/s", "mic-2")
            await shown.type("s", "▼name")
            await shown.type("s", "▼next seq")
            assert shown.text.index("mic-2") < shown.text.index("mic-1")
            if number is None:
                await shown.type("\x1b[Aq")  # an arrow means nothing
            else:
                shown.process.send_signal(number)
            assert await shown.end() == status


async def test_a_server_that_comes_and_goes_and_comes_back(tmp_path: Path) -> None:
    transport = {"endpoint": f"ipc://{tmp_path}/s"}
    async with watching(transport["endpoint"]) as shown:
        await shown.until("no answer for", "trying again")
        async with running(SEED_SIZED, transport=transport) as server:
            await shown.until("ready", absent="no answer")
            server.stop()
            await shown.until("no answer for", "ready")
        async with running(SEED_SIZED, transport=transport) as again, AsyncClient(again.endpoint) as client:
            await client.open("back")
            await shown.until("back", absent="no answer")
            await shown.type("q")
        assert await shown.end() == 0


async def test_a_swapped_model_is_shown_in_its_new_version(tmp_path: Path) -> None:
    old, new = replace(SMALL, name="ears"), replace(plain(5, 8, seed=9), name="ears")
    write_model(tmp_path / "new", new)
    async with running(old, engine={"max_batch_size": 16}) as server, watching(server.endpoint) as shown:
        async with AsyncClient(server.endpoint):
            await shown.until("ears, ")
            assert not await reload_models(server, tmp_path / "new")
            await shown.until(f"ears@{old.fingerprint[:8]}")
        await shown.until("ears, ", absent="ears@")  # a client of the old version would keep it
        await shown.type("q")
        assert await shown.end() == 0


def test_principals_are_shown_with_their_rates_the_busiest_first() -> None:
    def used(name: str, *numbers: float) -> dict[str, float]:
        keys = ("frames_total", "refused_total", "connections", "streams", "unread_bytes")
        return {f'principal_{key}{{principal="{name}"}}': number for key, number in zip(keys, numbers, strict=True)}

    def at(at_s: float, *principals: dict[str, float]) -> Snapshot:
        return replace(snapshot(at_s), numbers=defaultdict(lambda: math.nan, ChainMap(*principals)))

    before = at(1.0, used("ann", 100, 0, 1, 1, 0), used("bob", 0, 0, 1, 0, 0))
    now = at(3.0, used("ann", 102, 0, 1, 1, 0), used("bob", 50, 3, 2, 7, 0))
    rows = [line.split() for line in lines(ScreenView("tcp://h:1", now, before), 120) if line.startswith("principal")]
    assert [row[1] for row in rows] == ["bob:", "ann:"]
    assert [word for word in rows[0] if word.isdigit()] == ["2", "7", "0", "3"]
