from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from instep_tools.pacing import Stop
from instep_tools.problems import BadFile
from instep_tools.standard_input import CHUNK_BYTES, read_lines


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


async def all_of(descriptor: int) -> list[tuple[int, bytes]]:
    return [line async for line in read_lines(descriptor, Stop())]


@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_lines_of_a_file_are_numbered_and_the_last_one_may_have_no_end(tmp_path: Path, end: bytes) -> None:
    lines = [b"%d" % number * (number % 50) for number in range(5000)]
    (tmp_path / "f").write_bytes(b"\n".join(lines) + end)
    assert (tmp_path / "f").stat().st_size > 3 * CHUNK_BYTES
    with (tmp_path / "f").open("rb") as file:
        assert await all_of(file.fileno()) == list(enumerate(lines, 1))


async def test_a_line_comes_as_soon_as_it_is_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = read_lines(reader, Stop())
    for number, (written, line) in enumerate(((b"one\ntw", b"one"), (b"o\n", b"two")), 1):
        os.write(writer, written)
        assert await anext(lines) == (number, line)
    os.close(writer)
    assert [line async for line in lines] == []


async def test_a_stop_does_not_wait_for_a_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stop = Stop()
    os.write(writer, b"half a line")
    waiting = asyncio.ensure_future(anext(read_lines(reader, stop)))
    await asyncio.sleep(0)
    stop.request()
    with pytest.raises(StopAsyncIteration):
        await waiting
    os.close(writer)  # the thread that still reads sees the end and finds nobody to tell


async def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    write_only = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
    for descriptor in (os.open("/dev/zero", os.O_RDONLY), write_only):  # a line without an end, and no reading at all
        with pytest.raises(BadFile):
            await asyncio.wait_for(all_of(descriptor), 30)
        os.close(descriptor)
