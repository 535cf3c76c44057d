"""Damage that does not stop a restart is told: in the WAL at once, in the older part of a recording while it serves."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from instep.cli import app
from instep.recording.inspection import inspect
from instep.recording.scrub import Scrub
from instep_client.protocol.codes import HAVE_ALL
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames


async def lines_of_a_restart(path: Path, seconds: float) -> list[dict[str, Any]]:
    """What a server logs that continues the recording and serves for so long, or until it finds damage."""
    told: list[dict[str, Any]] = []
    async with running(SMALL, recording={"file": path}, told=told) as server, RawClient(server.endpoint) as client:
        await client.hello()
        assert (await client.resume(["s"], [HAVE_ALL], [0], take_over=True)).codes() == []
        for _ in range(round(seconds / 0.01)):
            if any(line["event"] == "recording damaged" for line in told):
                break
            await asyncio.sleep(0.01)
    return told


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("UPDATE batches SET x = zeroblob(length(x))", "(of batches) does not match its CRC"),
        ("DELETE FROM batches", "is missing"),
    ],
)
async def test_it_is_told_once_with_what_to_run(
    tmp_path: Path, rng: np.random.Generator, damage: str, what: str
) -> None:
    path = tmp_path / "r.instep"
    async with running(SMALL, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        for seq in range(100):
            await client.step(handles, [seq], random_frames(rng, 1), [seq])
    whole = await lines_of_a_restart(path, 0.5)
    assert "recovered" in [line["event"] for line in whole]
    assert {line["level"] for line in whole} == {"info", "debug"}
    database = sqlite3.connect(path)
    (position,) = database.execute("SELECT max(position) FROM batches WHERE position < 150").fetchone()
    database.execute(f"{damage} WHERE position = ?", [position])
    database.commit()
    database.close()
    told = await lines_of_a_restart(path, 30)
    (found,) = (line for line in told if line["event"] == "recording damaged")
    assert found["level"] == "error"
    assert f"the row at position {position} {what}" in found["reason"]
    repair = shlex.split(found["next"])
    assert CliRunner().invoke(app, repair[1:]).exit_code == 0
    assert 0 < inspect(tmp_path / "r.repaired.instep", lambda _: None).frames < 100


def test_a_read_that_never_returns_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    path, damage = tmp_path / "r.instep", list[Exception]()
    os.mkfifo(path)  # opening it waits for a writer
    stopping = threading.Thread(target=Scrub(path, 10, damage.append).stop, daemon=True)
    stopping.start()
    stopping.join(30)
    hangs = stopping.is_alive()
    path.open("wb").close()
    assert not hangs
    assert damage == []


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


async def test_a_wal_that_was_damaged_after_a_kill_is_told_by_a_restart_and_a_check(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path, killed = tmp_path / "r.instep", tmp_path / "k.instep"
    async with running(SMALL, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        for seq in range(20):
            await client.step(handles, [seq], random_frames(rng, 1), [seq])
        for suffix in ("", "-wal"):  # as a kill leaves them
            shutil.copy(f"{path}{suffix}", f"{killed}{suffix}")
    damage_middle(Path(f"{killed}-wal"))
    checked = CliRunner().invoke(app, ["recordings", "check", str(killed)])
    assert "its WAL is damaged after" in " ".join(checked.output.split())
    lines = [line for line in await lines_of_a_restart(killed, 0) if line["event"] == "recording lost its end"]
    assert [line["level"] for line in lines] == ["warning"]
    assert "the commits after that" in lines[0]["reason"]
