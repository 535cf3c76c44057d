"""The processes that check what a server records: how they are started, replaced and ended."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from instep.server.background import Background, Process
from instep_client import AsyncClient
from tests.support.beside import frames, start_program, until
from tests.support.live_verifying import EARS, VERIFY, checked_stream, found, step_all
from tests.support.live_verifying import folder as folder
from tests.support.models import plain
from tests.support.running import IN_FORKS, running


async def test_a_checker_that_dies_is_followed_by_another(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    recording = {"file": tmp_path / "r.instep"}
    async with running(EARS, folder=folder, told=told, recording=recording, **VERIFY) as server:
        async with AsyncClient(server.endpoint) as client:
            stream, former = await checked_stream(server, client, rng)
            os.kill(former, 35)  # a real-time signal, which has no name
            await until(lambda: found(server).pid not in (former, None))
            await step_all([stream], frames(rng, 20, 1))
            await until(lambda: found(server).frames_total >= 40)
            assert (found(server).state, found(server).frames_total, found(server).skipped) == ("verified", 40, 0)
    (line,) = (line for line in told if line["event"] == "checker restarts")
    assert "signal 35" in line["reason"]


async def test_what_is_recorded_just_before_the_end_is_compared_or_said(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    for hangs in (False, True):
        file, told = tmp_path / f"{hangs}.instep", list[dict[str, Any]]()
        async with running(EARS, folder=folder, told=told, recording={"file": file}, **VERIFY) as server:
            async with AsyncClient(server.endpoint) as client:
                stream, pid = await checked_stream(server, client, rng)
                if hangs:
                    os.kill(pid, signal.SIGSTOP)
                await stream.step(frames(rng, 50))
                await stream.close()
            verification = found(server)
        assert verification.frames_total == (20 if hangs else 70)
        said = [line["next"] for line in told if line["event"] == "not all verified"]
        assert said == [f"instep verify {file} checks all of it"] * hangs


STATUS: dict[str, Any] = {
    **dict.fromkeys(("frames", "skipped", "waiting", "streams", "lag_s", "position", "applied", "mismatches_total"), 0),
    "skipped_by": {},
    "share": 1,
    "mismatches": [],
    "notes": [],
    "unreadable": "",
}
"""What a checker says that has compared nothing."""
CHECKS_AT_THE_END = f"""
import pathlib, sys, time
file = pathlib.Path(sys.argv[2])
print({json.dumps(STATUS)!r}, flush=True)
sys.stdin.read()
file.with_suffix(".ending").touch()
while len(list(file.parent.glob("*.ending"))) < 2:
    time.sleep(0.01)
print({json.dumps(STATUS | {"position": 10**9})!r}, flush=True)
"""
"""A checker that compares nothing until another one is told to end, too."""


async def test_the_checkers_of_several_models_end_side_by_side(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    background = Background(partial(start_program, CHECKS_AT_THE_END), finish_s=20.0)
    told, models = list[dict[str, Any]](), (EARS, replace(plain(5, 8, seed=9), name="other"))
    (tmp_path / "recordings").mkdir()
    recording = {"file": tmp_path / "recordings"}
    async with running(
        *models, folder=folder, told=told, background=background, recording=recording, **VERIFY
    ) as server:
        for model in models:
            async with AsyncClient(server.endpoint, model=model.name) as client:
                await (await client.open("s")).step(frames(rng))
        checks = [service.verification for service in server.services]
        await until(lambda: all(each is not None and each.reported_s for each in checks))
    assert not [line for line in told if line["event"] == "not all verified"]


async def test_no_checker_is_started_while_the_server_ends(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    background = replace(IN_FORKS, first_pause_s=5.0, finish_s=60.0)
    told, sections = list[dict[str, Any]](), {"recording": {"file": tmp_path / "r.instep"}, **VERIFY}
    async with running(EARS, folder=folder, told=told, background=background, **sections) as server:
        async with AsyncClient(server.endpoint) as client:
            _, pid = await checked_stream(server, client, rng)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: found(server).pid is None)
    assert sum(line["event"] == "verifying" for line in told) == 1


async def test_a_checker_that_talks_nonsense_is_replaced(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told, sections = list[dict[str, Any]](), {"recording": {"file": tmp_path / "r.instep"}, **VERIFY}
    talk = partial(start_program, "print(17, 'null', '[1]', 'x' * 2**25, sep='\\n'); input(); input()")

    async def start(words: Sequence[str]) -> Process:
        has_talked = any(line["event"] == "verifying" for line in told)
        return await (IN_FORKS.start if has_talked else talk)(words)

    async with running(EARS, folder=folder, told=told, background=Background(start), **sections) as server:
        async with AsyncClient(server.endpoint) as client:
            await step_all([await client.open("s")], frames(rng, 20, 1))
            await until(lambda: found(server).frames_total == 20)
    (line,) = (line for line in told if line["event"] == "checker restarts")
    assert "longer than limit" in line["reason"] or "exceed" in line["reason"], line


async def test_a_checker_that_never_reports_is_behind(folder: Path, tmp_path: Path) -> None:
    sections = {"recording": {"file": tmp_path / "r.instep"}, **VERIFY}
    background = Background(partial(start_program, "input(); input()"))
    async with running(EARS, folder=folder, background=background, **sections) as server:
        await until(lambda: found(server).lag_s > 2)
        assert (found(server).state, found(server).frames_total) == ("checking", 0)


async def test_a_recording_that_cannot_be_read_is_told_of_once(folder: Path, tmp_path: Path) -> None:
    told, sections = list[dict[str, Any]](), {"recording": {"file": tmp_path / "r.instep"}, **VERIFY}
    statuses = [json.dumps(STATUS | {"unreadable": "it is locked", "lag_s": 20 + late_s}) for late_s in range(3)]
    code = f"print(*{statuses}, sep='\\n', flush=True); input(); input()"
    background = Background(partial(start_program, code))
    async with running(EARS, folder=folder, told=told, background=background, **sections) as server:
        await until(lambda: found(server).reported_lag_s == 22)
        assert (found(server).state, found(server).as_json()["reason"]) == ("checking", "it is locked")
    (line,) = (line for line in told if line["event"] == "checker waits")
    assert (line["level"], line["reason"]) == ("warning", "it is locked")


async def test_a_checker_that_hangs_holds_nobody_up(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    told, file, wal = list[dict[str, Any]](), tmp_path / "r.instep", tmp_path / "r.instep-wal"
    background = replace(IN_FORKS, most_wal_bytes=3 * 2**20)
    sections = {"recording": {"file": file}, **VERIFY}
    async with running(EARS, folder=folder, told=told, background=background, **sections) as server:
        async with AsyncClient(server.endpoint) as client:
            stream, former = await checked_stream(server, client, rng)
            os.kill(former, signal.SIGSTOP)
            await step_all([stream], frames(rng, 20, 1))
            await until(lambda: found(server).lag_s > 2)
            assert (found(server).frames_total, found(server).pid) == (20, former)
            with closing(sqlite3.connect(file, isolation_level=None)) as reader:
                # As if the checker had been stopped in the middle of a read: else the WAL is written over and over.
                reader.execute("BEGIN")
                reader.execute("SELECT position FROM newest").fetchall()
                while wal.stat().st_size <= background.most_wal_bytes:
                    await step_all([stream], frames(rng, 20, 1))
                await until(lambda: found(server).pid not in (former, None))
    assert any(line["event"] == "checker killed" for line in told)
