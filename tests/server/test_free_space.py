"""The log warns before the disk of the recording is full."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from instep.config import Config
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running


async def test_it_warns_once_when_little_is_left_and_says_once_when_there_is_room_again(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    recording = {"file": tmp_path / "r.instep", "warn_free_bytes": 2**62}

    async def until(event: str) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not (lines := [line for line in told if line["event"] == event]):
                await asyncio.sleep(0.01)
        return lines[-1]

    async with running(SMALL, recording=recording, told=told) as server, RawClient(server.endpoint) as client:
        warning = await until("disk nearly full")
        disk = os.statvfs(tmp_path)
        assert warning["level"] == "warning"
        assert 0 < warning["free_bytes"] < disk.f_blocks * disk.f_frsize
        await client.hello()
        assert (await client.statistics())["recording_free_bytes"] > 0
        sections = server.config.model_dump()
        sections["recording"]["warn_free_bytes"] = 0
        server.configure(Config.model_validate(sections))
        assert (await until("disk has room again"))["level"] == "info"
    assert len([line for line in told if line["event"].startswith("disk")]) == 2
