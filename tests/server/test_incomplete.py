"""A start on a recording of which files are missing or damaged goes on with what is there, and says so."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from instep.recording import family
from instep.server.preparation import CannotServe
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running


async def recorded(path: Path, files: int) -> list[int]:
    """A stream `s` in each of so many files; its epochs."""
    async with running(SMALL, recording={"file": path, "max_age_s": 1e6}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            for number in range(2, files + 1):
                await client.open(f"other-{number}")
                server._rotation._max_age_ns = 1  # once: nothing is recorded after it
                while not family.member_path(path, number).exists():
                    await client.read_state(opened.handles())
                server._rotation._max_age_ns = 0
    return opened.epochs()


async def warnings_of_a_start(path: Path, epochs: list[int]) -> list[dict[str, Any]]:
    """What a server says that goes on with the stream."""
    told = list[dict[str, Any]]()
    async with running(SMALL, told=told, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        assert (await client.resume(["s"], [0], epochs)).codes() == []
    return [each for each in told if each["level"] == "warning"]


async def test_a_newest_file_that_is_missing_is_said_and_the_one_before_it_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    epochs = await recorded(path, 2)
    family.member_path(path, 2).unlink()
    (warning,) = await warnings_of_a_start(path, epochs)
    assert (warning["event"], warning["file"]) == ("newest file missing", str(path))
    assert warning["reason"].startswith("the recording goes on in r-000002.instep, which is not there; ")
    assert await warnings_of_a_start(path, epochs) == []


@pytest.mark.parametrize("damage", [b"gone", None])
async def test_an_older_file_that_cannot_be_read_is_said(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "r.instep"
    epochs = await recorded(path, 3)
    if damage is not None:
        family.member_path(path, 2).write_bytes(damage)
    said = await warnings_of_a_start(path, epochs)
    assert [each["event"] for each in said] == (["damaged file kept"] if damage else [])
    assert all("r-000002.instep is not a recording" in each["reason"] for each in said)


async def test_a_place_where_no_recording_can_be(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path, f"{tmp_path} is a folder: name a file for the recording, like {tmp_path / 'r.instep'}"),
        (
            tmp_path / "nodir" / "x.instep",
            f"there is no folder {tmp_path / 'nodir'} for the recording x.instep: make it",
        ),
    ):
        with pytest.raises(CannotServe, match=re.escape(said)):
            async with running(SMALL, recording={"file": path}):
                pass
    assert not os.listdir(tmp_path)
