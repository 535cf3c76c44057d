from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from instep_tools.feed import CHUNK_BYTES, read_lines
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


async def all_of(descriptor: int) -> list[tuple[int, bytes]]:
    return [line async for line in read_lines(descriptor, Stop())]


async def test_lines_of_a_file_are_numbered(tmp_path: Path) -> None:
    lines = [b"%d" % number * (number % 50) for number in range(5000)]
    (tmp_path / "f").write_bytes(b"\n".join(lines))
    assert (tmp_path / "f").stat().st_size > 3 * CHUNK_BYTES
    with (tmp_path / "f").open("rb") as file:
        assert await all_of(file.fileno()) == list(enumerate(lines, 1))


@pytest.mark.parametrize(("data", "lines"), [(b"", []), (b"a", [b"a"]), (b"a\n", [b"a"]), (b"\n\nb", [b"", b"", b"b"])])
async def test_the_last_line_may_have_no_end(tmp_path: Path, data: bytes, lines: list[bytes]) -> None:
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as file:
        assert await all_of(file.fileno()) == list(enumerate(lines, 1))


async def test_a_line_comes_as_soon_as_it_is_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = read_lines(reader, Stop())
    os.write(writer, b"one\ntw")
    assert await anext(lines) == (1, b"one")
    os.write(writer, b"o\n")
    assert await anext(lines) == (2, b"two")
    os.close(writer)
    with pytest.raises(StopAsyncIteration):
        await anext(lines)


async def test_a_stop_does_not_wait_for_a_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stop = Stop()
    lines = read_lines(reader, stop)
    os.write(writer, b"one\nhalf a line")
    assert await anext(lines) == (1, b"one")
    waiting = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0)
    stop.request()
    with pytest.raises(StopAsyncIteration):
        await waiting
    os.close(writer)  # the thread that still reads sees the end and finds nobody to tell


async def test_a_line_without_an_end_is_told() -> None:
    endless = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(BadFile, match="line 1 has no end within 16 MiB"):
        await asyncio.wait_for(all_of(endless), 30)
    os.close(endless)


async def test_a_failed_read_is_told(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(BadFile, match="the lines cannot be read: Bad file descriptor"):
        await all_of(descriptor)
    os.close(descriptor)
