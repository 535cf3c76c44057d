"""Whoever else opens the file that a server writes, and closes it, takes nothing away from it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from instep.recording.recovery import Recovered
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running

F = 5
LOOK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("SELECT count(*) FROM events").fetchone()
database.close()
"""


async def looked_at(path: Path) -> None:
    """Another process opens a file to read and write, reads, and closes it: the last one to do so removes the WAL."""
    outsider = await asyncio.create_subprocess_exec(sys.executable, "-c", LOOK, str(path))
    assert await outsider.wait() == 0


def frames_after_a_kill(path: Path, image: Path) -> int:
    """Of stream `s`, how many the files on the disk hold now."""
    image.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", image)
    with Recovered(image / path.name) as recovered:
        (stream,) = (stream for stream in recovered.load(recovered.names) if stream.name == "s")
        seqs = [stream.seq - 1]
        for portion in recovered.portions():
            seqs += portion.frames.seqs[portion.frames.streams == stream.stream].tolist()
    return seqs[-1] + 1


@pytest.mark.parametrize("when", ["new", "resumed"])
async def test_the_wal_stays_when_another_process_opens_and_closes_the_file_that_is_written(
    tmp_path: Path, when: str
) -> None:
    path = tmp_path / "r.instep"
    settings = {"file": path}
    if when == "resumed":
        async with running(SMALL, recording=settings) as server, RawClient(server.endpoint) as client:
            await client.hello()
            await client.open("old")
    async with running(SMALL, recording=settings) as server, RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s")
        for seq in range(6):
            reply = await client.step(opened.handles(), [seq], np.ones((1, 1, F), np.float32), [seq])
            assert reply.failures() == []
            if seq == 2:
                await looked_at(path)
                assert f"{path.name}-wal" in os.listdir(tmp_path)
        assert frames_after_a_kill(path, tmp_path / "image") == 6
