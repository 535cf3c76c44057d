"""Sends lines of text, each when it arrives."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Final

from instep_client.aio import AsyncClient, AsyncStream
from instep_client.daemon_thread import begin_in_thread
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import Refused, StreamRefused
from instep_tools.formats.columns import Choice
from instep_tools.formats.lines import BAD_LINES_NAMED, BadLine, LineReader
from instep_tools.outputs import Answers, SentFrames
from instep_tools.pacing import Clock, Pace, Stop, wait_until
from instep_tools.pipeline import pipeline
from instep_tools.problems import BadFile, CommandProblem
from instep_tools.terminal import Terminal

LINES_ON_THE_WAY: Final = 1024
CHUNK_BYTES: Final = 65_536
MAX_LINE_MIB: Final = 16
"""Longer than the text of any frame; a longer line is not text."""


def why_not_opened(refused: StreamRefused, is_own_name: bool = True) -> str:
    """The reason for a refused OPEN, and a cure that can be typed, such as --name if `is_own_name`."""
    if refused.code is not Code.NAME_IN_USE:
        return str(refused)
    other = "choose another name with --name, or " if is_own_name else ""
    close = f"instep streams close {shlex.quote(refused.stream)}"
    return f"{refused.code.name}: a stream {refused.stream!r} is open or parked: {other}close it with {close}"


@dataclass
class LineSender:
    """One connection, and the streams that lines name."""

    client: AsyncClient
    pace: Pace
    answers: Answers
    terminal: Terminal
    stop: Stop
    clock: Clock
    bad_lines: int = 0
    """The number of lines that were not frames."""
    all_ended: bool = False
    """Whether it stopped because the server had ended every stream."""
    _start: float = 0.0
    _first_ns: int | None = None

    async def send_lines(self, lines: AsyncIterator[tuple[int, bytes]], own_name: str, choice: Choice) -> int:
        """Send every line when it arrives, or when its stream's next frame is due; then drain and close.

        Returns the number of streams. Lines that name no stream go to the one called `own_name`.

        Raises:
            CommandProblem: when streams are chosen by name and a line names none.
        """
        reader = LineReader(choice, self.client.info.features)
        streams: dict[str, AsyncStream | None] = {}
        sent: Counter[str] = Counter()
        bad_together = 0
        async with pipeline(self.answers.take, LINES_ON_THE_WAY) as send:
            self._start = self.clock.now()
            async for number, text in lines:
                try:
                    line = reader.read(text.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:
                    bad_together += 1
                    self._tell_bad_line(number, error, bad_together)
                    continue
                if line is None:
                    continue
                if line.stream is None and choice.streams != "*":
                    raise CommandProblem(
                        "--streams chooses streams by their names, and the lines have none: leave it out, or name the "
                        "stream in a column (--named, or a header with the column stream)"
                    )
                if line.stream is not None and not fnmatchcase(line.stream, choice.streams):
                    continue
                bad_together = 0
                name = line.stream or own_name
                if self.answers.ended and self.answers.ended >= {*filter(streams.get, streams)}:
                    self.all_ended = True
                    break
                if name not in streams:
                    streams[name] = await self._open(name, is_own_name=line.stream is None)
                stream = streams[name]
                if sent[name] == self.pace.frames and line.stream is None:
                    break
                if stream is None or sent[name] == self.pace.frames:
                    continue
                due = self._start + self._due_s(sent[name], line.time_ns)
                if not await wait_until(due, self.clock, self.stop):
                    break
                sent[name] += 1
                await send(SentFrames((name,), line.frame[None, None]), partial(stream.step, line.frame[None]))
        for stream in streams.values():
            if stream is not None:
                with suppress(Refused):  # told of when its frames were refused
                    await stream.close()
        return len(streams)

    def _tell_bad_line(self, number: int, error: ValueError, together: int) -> None:
        """Report a bad line. Of consecutive bad lines only the first are named, because the file is wrong then."""
        self.bad_lines += 1
        if together <= BAD_LINES_NAMED:
            reason = error if isinstance(error, BadLine) else "it is not UTF-8"
            self.terminal.error(f"line {number}: {reason}")
        elif together == BAD_LINES_NAMED + 1:
            self.terminal.error("and so on: the bad lines that follow are counted, until a good one comes")

    async def _open(self, name: str, is_own_name: bool) -> AsyncStream | None:
        try:
            return await self.client.open(name)
        except StreamRefused as refused:
            self.terminal.error(f"{why_not_opened(refused, is_own_name)}; its lines are left out")
            self.answers.refused += 1
            return None

    def _due_s(self, frame: int, time_ns: int | None) -> float:
        if self.pace.rate_hz is not None:
            return frame / self.pace.rate_hz
        if time_ns is None:
            return 0.0
        if self._first_ns is None:
            self._first_ns = time_ns
        return max(0, time_ns - self._first_ns) / 1e9 / (self.pace.speed or 1.0)


async def read_lines(descriptor: int, stop: Stop) -> AsyncIterator[tuple[int, bytes]]:
    """The numbered lines (from 1), without their ends, until the end of the file or a stop.

    Raises:
        BadFile: when reading fails, or a line has no end within `MAX_LINE_MIB`.
    """
    number, rest = 0, bytearray()
    while chunk := await _read_unless_stopped(descriptor, stop):
        *lines, last = chunk.split(b"\n")
        for line in lines:
            number += 1
            yield number, bytes(rest + line)
            rest.clear()
        rest += last
        if len(rest) > MAX_LINE_MIB << 20:
            raise BadFile(f"line {number + 1} has no end within {MAX_LINE_MIB} MiB: give text, one frame a line")
    if rest and not stop.requested:
        yield number + 1, bytes(rest)


async def _read_unless_stopped(descriptor: int, stop: Stop) -> bytes:
    # In a daemon thread, because a read from a terminal may never return.
    read = begin_in_thread(partial(os.read, descriptor, CHUNK_BYTES), "instep-lines")
    reading = asyncio.wrap_future(read)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.requested:
        reading.cancel()
        return b""
    try:
        return reading.result()
    except OSError as error:
        raise BadFile(f"the lines cannot be read: {error.strerror}") from None
