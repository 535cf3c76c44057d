"""The process that checks what a server records."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from instep.replay import live_process as live
from tests.support.growing import Story


def test_a_recording_that_is_locked_is_checked_afterwards_and_let_go_of(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    story.scribe.writer.close()
    process = subprocess.Popen(
        [sys.executable, "-c", "import instep.replay.live_process as live; live._UNREADABLE_S = 0.0; live.main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(**fields: object) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(fields) + "\n")
        process.stdin.flush()

    with process, closing(sqlite3.connect(story.path, isolation_level=None)) as database:
        follow = {"follow": str(story.path), "position": 0, "applied": 0}
        ask(**follow)
        status = json.loads(process.stdout.readline())
        assert (status["frames"], status["skipped"], status["left"]) == (5, 0, False)
        database.execute("BEGIN EXCLUSIVE")
        while not (status := json.loads(process.stdout.readline()))["unreadable"]:
            assert status["frames"] == 5
        assert "database is locked; try again" in status["unreadable"]
        database.execute("ROLLBACK")
        ask(leave=str(story.path), finish=True)
        while not status["left"]:
            status = json.loads(process.stdout.readline())
        assert (status["unreadable"], status["frames"]) == ("", 5)
        ask(**(follow | {"follow": str(tmp_path / "none.rec")}))
        assert "cannot read the recording" in json.loads(process.stdout.readline())["error"]
        process.stdin.close()
        assert process.wait(30) == 0


def test_many_mismatches_are_told_in_lines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    for _ in range(3):
        story.corrupts = 1
        story.step(story.open())
    story.scribe.writer.close()
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(live, "_write", lines.append)
    recording = live._Recording(str(story.path), 0, 0)
    recording.is_finishing = True
    while not recording.is_over:
        recording.look()
    assert [each["stream"] for line in lines for each in line["mismatches"]] == ["stream-1", "stream-2", "stream-3"]
    assert {len(line["mismatches"]) for line in lines} == {1}
    assert [line["left"] for line in lines] == [False, False, True]
