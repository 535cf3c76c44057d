"""The audit: what is in it, and what happens where the disk cannot take it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from instep.config import LogConfig
from instep.server.audit import MOST_LINES, Audit
from instep.server.log import make_log
from instep_client import AsyncClient
from tests.support.models import SMALL
from tests.support.running import log_into, running


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_of_every_level_that_belong_to_it_and_one_refusal_of_a_kind_in_a_second(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit")
    log = make_log(LogConfig(level="error", file=tmp_path / "log"), audit=audit)
    log.debug("connected", principal="ann")
    log.error("step failed")
    for code, principal in [("BUSY", "ann"), ("BUSY", "ann"), ("BUSY", "bob"), ("NOT_ALLOWED", "ann")]:
        log.debug("refused", code=code, principal=principal)
    log.info("swapped", folder=tmp_path)
    audit.close()
    lines = lines_of(tmp_path / "audit")
    assert [(each["event"], each.get("code"), each.get("principal")) for each in lines] == [
        ("connected", None, "ann"),
        ("refused", "BUSY", "ann"),
        ("refused", "BUSY", "bob"),
        ("refused", "NOT_ALLOWED", "ann"),
        ("swapped", None, None),
    ]
    assert lines[-1]["folder"] == str(tmp_path)
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_takes_nothing_holds_up_nothing_and_what_was_dropped_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instep.server.audit._CLOSE_S", 60.0)  # whatever else the machine does
    file = tmp_path / "audit"
    audit = Audit(file)
    log = make_log(LogConfig(level="error"), audit=audit)
    os.mkfifo(file)  # to open it takes until somebody reads
    for number in range(2 * MOST_LINES):
        log.debug("connected", number=number)
    with file.open() as reader:
        file.unlink()
        audit.close()
        lines = [*map(json.loads, reader.readlines()), *lines_of(file)]
    assert [each["number"] for each in lines] == list(range(len(lines)))
    assert MOST_LINES <= len(lines) <= MOST_LINES + 1
    assert sum(each.get("dropped_before", 0) for each in lines) == 2 * MOST_LINES - len(lines)


def test_a_folder_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    folder, moved = tmp_path / "audit", tmp_path / "audit.1"
    folder.mkdir()
    audit = Audit(folder / "lines")
    log = make_log(LogConfig(level="error"), audit=audit)
    told: list[dict[str, Any]] = []
    audit.log = log_into(told)
    folder.rename(moved)
    for number in range(2):
        log.debug("connected", number=number)
    while audit.failed < 2:
        pass
    assert [line["event"] for line in told] == ["audit not written"]
    folder.mkdir()
    log.debug("connected", number=2)
    audit.close()
    (line,) = lines_of(folder / "lines")
    assert (line["number"], line["dropped_before"]) == (2, 2)


async def test_who_did_what_on_a_server() -> None:
    told: list[dict[str, Any]] = []
    async with running(SMALL, told=told) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic-1")
        await stream.reset()
        async with AsyncClient(server.endpoint) as other:
            await other.read_state("mic-1")
            await other.resume("mic-1", take_over=True)
            await other.remove_streams(["mic-1"], park=True)
    requests = [each for each in told if each["event"] == "audited request"]
    wanted = [("RESET", []), ("READ_STATE", ["mic-1"]), ("RESUME", ["mic-1"]), ("REMOVE", ["mic-1"])]
    assert [(each["request"], each["names"]) for each in requests] == wanted
    assert requests[-1]["park"]
    assert {each["principal"] for each in requests} == {"local"}
    assert [each["address"] for each in told if each["event"] == "connected"] == ["127.0.0.1"] * 2
