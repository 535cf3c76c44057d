"""`instep-client top`: look at a server again and again, and draw what is there."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.text import Text

from instep_client.protocol.errors import InstepError
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, Exit
from instep_tools.terminal import Terminal
from instep_tools.top.full_screen import FullScreen
from instep_tools.top.http_source import HttpSource
from instep_tools.top.screen import Picture, draw
from instep_tools.top.snapshot import Snapshot, SnapshotRates, Source, StreamQuery, as_json, rates_between
from instep_tools.top.view import ScreenView
from instep_tools.top.zmq_source import LEAST_APART_S, ZmqSource

HISTORY: Final = 600
"""Rates that are remembered for the bars."""

MOST_STREAMS: Final = 500
"""The largest number of streams that is asked for; the admin server gives no more."""

WAITING_S: Final = 1.5
"""An answer that takes longer than this is said to be missing; the connection is given up later."""


@dataclass(frozen=True, slots=True)
class Top:
    """The options of the command."""

    endpoint: str
    """tcp:// or ipc:// for ZeroMQ, http:// or https://."""
    model: str = ""
    every_s: float = 1.0
    once: bool = False
    token_file: Path | None = None


async def top(what: Top, terminal: Terminal, stop: Stop) -> Exit:
    """Show a server until the user quits; once where asked for, or where there is no terminal.

    Raises:
        InstepError: when it is shown once, and there is no answer.
    """
    stop.connected = True  # so that Ctrl-C cancels this rather than be raised somewhere in the middle of drawing
    source = source_of(what)
    try:
        watch = _Watch(source, what)
        if what.once or terminal.as_json or not FullScreen.is_possible(terminal.out):
            return await watch.once(terminal)
        return await watch.live(terminal)
    finally:
        await source.close()


def source_of(what: Top) -> Source:
    """Where snapshots of it come from.

    Raises:
        BadFile: the token cannot be read.
    """
    if not what.endpoint.startswith(("http://", "https://")):
        return ZmqSource(what.endpoint)
    token = None
    if what.token_file is not None:
        try:
            token = what.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds other characters than ASCII"
            raise BadFile(f"{what.token_file} cannot be read as a token: {reason}") from None
    return HttpSource(what.endpoint, token)


class _Watch:
    """One run of the command: its newest snapshots and its view."""

    def __init__(self, source: Source, what: Top) -> None:
        self._source = source
        self._what = what
        self._view = ScreenView(StreamQuery(model=what.model))
        self._base: Snapshot | None = None
        """Where the rates begin."""
        self._now: Snapshot | None = None
        self._rates: SnapshotRates | None = None
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._lost = ""
        """Why the newest look brought nothing; empty where it did."""
        self._answered_at = time.monotonic()
        self._asked_at: float | None = None
        """When the look that is under way began."""
        self._asked = asyncio.Event()
        self._height = 0
        """Of the screen: more streams than that are not asked for."""

    async def once(self, terminal: Terminal) -> Exit:
        """Look twice, so that there are rates, and print the second view."""
        await self._look()
        await asyncio.sleep(max(self._what.every_s, LEAST_APART_S))
        await self._look()
        assert self._now is not None
        if terminal.as_json:
            terminal.result(as_json(self._source.endpoint, self._now, self._rates))
            return Exit.OK
        width, height = terminal.out.size if terminal.out.is_terminal else (80, 24)
        for line in self._draw(width, height, keys=False):
            terminal.out.print(line)
        return Exit.OK

    async def live(self, terminal: Terminal) -> Exit:
        """Look until the user quits."""
        ended = asyncio.Event()

        def press(text: str) -> None:
            if self._view.press(text):
                self._asked.set()
            if self._view.done:
                ended.set()
            screen.refresh()

        screen = FullScreen(terminal.out, self._draw, press, ended.set)
        with screen:
            tasks = [asyncio.create_task(each) for each in (self._keep_looking(screen), _tick(screen), ended.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return Exit.OK

    async def _keep_looking(self, screen: FullScreen) -> None:
        screen.refresh()
        while True:
            if self._asked.is_set() or not self._view.paused:
                self._asked.clear()
                self._asked_at = time.monotonic()
                try:
                    await self._look()
                    self._lost, self._answered_at = "", time.monotonic()
                except InstepError as error:
                    self._lost = str(error)
                    self._base = None
                self._asked_at = None
            screen.refresh()
            try:
                async with asyncio.timeout(self._what.every_s):
                    await self._asked.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        most = min(max(self._height, StreamQuery().limit), MOST_STREAMS)
        now = await self._source.read(self._view.query._replace(limit=most))
        self._view.models = [model.name for model in now.models]
        if self._now is None or now.model.name != self._now.model.name:
            self._base, self._rates = None, None
            self._history.clear()
        self._now, self._view.model = now, now.model.name
        if self._base is None:
            self._base = now
        elif now.time_s - self._base.time_s >= min(self._what.every_s, LEAST_APART_S) * 0.9:
            self._rates = rates_between(self._base, now)
            self._base = now
            if self._rates is not None:
                self._history.append(self._rates.numbers.get("frames_total", 0.0))

    def _draw(self, width: int, height: int, keys: bool = True) -> list[Text]:
        self._height = height
        now, lost = time.monotonic(), ""
        if self._lost:
            lost = f"no answer for {now - self._answered_at:.0f} s, trying again: {self._lost}"
        elif self._asked_at is not None and now - self._asked_at > WAITING_S:
            lost = f"no answer for {now - self._answered_at:.0f} s"
        picture = Picture(self._source.endpoint, self._view, self._now, self._rates, self._history, lost)
        return draw(picture, width, height, keys)


async def _tick(screen: FullScreen) -> None:
    """Draw every second, also while an answer is missing."""
    while True:
        await asyncio.sleep(1)
        screen.refresh()
