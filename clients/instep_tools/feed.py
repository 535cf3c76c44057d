"""Lines of text as they arrive, from a file, a pipe or a terminal, without ever blocking the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from instep_tools.pacing import Stop
from instep_tools.problems import BadFile

CHUNK_BYTES: Final = 65_536
MAX_LINE_MIB: Final = 16
"""Longer than the text of any frame; a longer line is not text."""


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
    reading = asyncio.ensure_future(_read(descriptor))
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


def _read(descriptor: int) -> asyncio.Future[bytes]:
    """Read once, in a thread of its own.

    A daemon: a read from a terminal may never return, and must not keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[bytes] = loop.create_future()

    def deliver(data: bytes | OSError) -> None:
        if result.cancelled():
            return
        if isinstance(data, OSError):
            result.set_exception(data)
        else:
            result.set_result(data)

    def read() -> None:
        try:
            data: bytes | OSError = os.read(descriptor, CHUNK_BYTES)
        except OSError as error:
            data = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(deliver, data)

    threading.Thread(target=read, daemon=True, name="instep-client-lines").start()
    return result
