"""The log on a terminal and in a file, and what it says of a server at work and of its disk."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from instep.config import Config, LogConfig
from instep.server.log import make_log
from instep.server.server import COUNTED, Summary
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import log_into, running


def test_a_log_in_a_file_follows_its_name_when_it_is_rotated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, moved = tmp_path / "log", tmp_path / "log.1"
    config = LogConfig(file=file, format="json")
    log = make_log(config)
    log.info("first")
    file.rename(moved)
    log.info("second")
    log.info("third")
    file.unlink()
    log.warning("fourth")
    make_log(config).info("fifth")
    events = [[json.loads(line)["event"] for line in each.read_text().splitlines()] for each in (moved, file)]
    assert events == [["first"], ["fourth", "fifth"]]
    make_log(LogConfig(file=file)).info("recording", file=os.fsdecode(b"\xff.instep"))
    assert file.read_text().endswith("info recording file=\\udcff.instep\n")
    assert capsys.readouterr() == ("", "")


STATISTICS = dict.fromkeys(map("{}_total".format, ("frames", "batches", "messages", *COUNTED)), 5.0) | {
    "connections": 2.0,
    "streams_open": 3.0,
    "streams_parked": 1.0,
    "frames_pending": 0.0,
}


def test_it_says_what_has_happened_since_it_last_did() -> None:
    told: list[dict[str, Any]] = []
    now = dict(STATISTICS)
    summary = Summary(log_into(told), lambda: dict(now), now_s=100.0)
    now |= {"frames_total": 405.0, "batches_total": 25.0, "messages_total": 105.0, "opened_streams_total": 8.0}
    summary.tick(109.9, 10.0)
    summary.tick(1000.0, 0.0)  # never
    assert told == []
    summary.tick(110.0, 10.0)
    summary.tick(120.0, 10.0)
    (line,) = told
    assert (line["event"], line["seconds"], line["frames_per_s"], line["messages_per_s"]) == ("served", 10.0, 40, 10)
    assert (line["batch_size"], line["streams_open"], line["opened_streams"], "busy" in line) == (20.0, 3, 3, False)
    now["busy_total"] += 7
    summary.tick(130.0, 10.0)
    assert (told[-1]["busy"], told[-1]["batch_size"]) == (7, 0.0)


async def test_it_warns_once_when_little_is_left_and_says_once_when_there_is_room_again(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    recording = {"path": tmp_path / "r.instep", "warn_free_bytes": 2**62}

    async def until(event: str) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not (lines := [line for line in told if line["event"] == event]):
                await asyncio.sleep(0.01)
        return lines[-1]

    async with running(SMALL, recording=recording, told=told) as server, RawClient(server.endpoint) as client:
        warning = await until("disk nearly full")
        assert warning["level"] == "warning"
        assert warning["free_bytes"] > 0
        await client.hello()
        assert (await client.statistics())["recording_free_bytes"] > 0
        sections = server.config.model_dump()
        sections["recording"]["warn_free_bytes"] = 0
        server.configure(Config.model_validate(sections))
        assert (await until("disk has room again"))["level"] == "info"
    assert len([line for line in told if line["event"].startswith("disk")]) == 2
