"""`instep verify --follow`: what it says while a recording grows, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.cli import app
from instep.interrupts import ENDINGS, Stopped
from instep.recording.errors import UnavailableRecording
from instep.recording.trim import KEEP_ALL, Retention
from instep.verify.command import follow
from instep.verify.follow_command import Following
from instep.verify.following import Follower
from instep.verify.portion import FollowLimits
from instep.verify.throttle import Patience
from tests.support.forger import Forger
from tests.support.growing import Story
from tests.support.interrupting import reporting
from tests.support.verifying import verify_following
from tests.support.warm import WarmProcess


@pytest.mark.parametrize("retention", [KEEP_ALL, Retention(keep_bytes=100_000)], ids=["all", "trimmed"])
def test_the_command_follows_a_file_that_grows(tmp_path: Path, retention: Retention) -> None:
    told: list[Story] = []
    ready, over = Event(), Event()

    def grow() -> None:
        story = Story(tmp_path, 1, retention)
        told.append(story)
        ready.set()
        while not over.wait(0.01):
            story.anything()
        story.scribe.writer.commit()
        story.scribe.writer.close()

    writing = Thread(target=grow)
    writing.start()
    try:
        assert ready.wait(60)
        status, text = verify_following(tmp_path / "a.rec", "--for", "2")
        assert status == 0, text
        *_, summary = text.splitlines()
        (line, *_) = [line for line in text.splitlines() if line.endswith("behind")]
        assert re.fullmatch(r"\d+ streams?, [\d,]+ frames?, 0 mismatches, \d+\.\d s behind", line), text
        assert re.match(r"verified: \d+ streams?, [\d,]+ frames, exact, 0 mismatches", summary), text
        assert len(line) <= 80
        status, text = verify_following(tmp_path / "a.rec", "--for", "1.5", "--json")
        assert status == 0, text
        first, *_, last = map(json.loads, text.splitlines())
        assert (first["final"], last["final"], last["verified"], last["mismatches"]) == (False, True, True, [])
        assert last["frames"] > 0
    finally:
        over.set()
        writing.join()
    assert not Path(f"{tmp_path / 'a.rec'}-wal").exists(), "nobody kept it from being closed in order"


def test_the_command_finds_what_was_changed_in_the_file(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(4)]
    story.step(*streams, frames=5)
    story.scribe.writer.close()
    for fix_crc, expected in ((True, 1), (False, 2)):
        forger = Forger(story.path, tmp_path / f"{fix_crc}.rec", fix_crc=fix_crc)
        batch, at = forger.find_frame(3, 4)
        y = forger.column(batch, "y")
        y.view(np.uint8)[at, 1] ^= 1
        forger.change_batch(batch, y=y)
        status, text = verify_following(forger.path, "--for", "0")
        assert status == expected, text
        assert ("mismatch in stream 3 (stream-3): frame 4, element 0" if fix_crc else "damaged") in text
    assert verify_following(story.path, "--for", "0")[0] == 0


def test_a_mismatch_counts_for_more_than_damage_that_is_met_later(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(4)]
    story.corrupts = 2
    story.step(*streams)
    story.step(*streams, frames=20)
    story.scribe.writer.close()
    forger = Forger(story.path, tmp_path / "damaged.rec", fix_crc=False)
    batch, _ = forger.find_frame(3, story.scribe.seqs[3] - 1)
    forger.change_batch(batch, y=forger.column(batch, "y") + 1)
    following = partial(Following, forger.path, None, (), limits=FollowLimits(portion_bytes=100))
    file, told = io.StringIO(), list[dict[str, Any]]()
    assert following().in_words(0, Console(file=file)) == "mismatch"
    text = file.getvalue()
    assert re.search(r"1 mismatch; .*not checked: .*damaged.rec is damaged: .*instep recordings repair", text), text
    assert following().in_json(0, told.append) == "mismatch"
    assert (told[-1]["verdict"], told[-1]["final"]) == ("mismatch", True)
    assert "is damaged" in told[-1]["summary"]


def test_it_says_that_the_recording_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    advance, file, told = Follower.advance, io.StringIO(), list[dict[str, Any]]()

    def advance_later(follower: Follower) -> bool:
        said = file.getvalue() + json.dumps(told)
        if "it is locked" not in said:
            raise UnavailableRecording("it is locked")
        os.kill(os.getpid(), signal.SIGINT)
        return advance(follower)

    monkeypatch.setattr(Follower, "advance", advance_later)
    following = partial(Following, story.path, None, (), Patience(retry_s=0.01, unreadable_s=0))
    with reporting(same_signal_s=1e9):
        following().in_words(100, Console(file=file, force_terminal=True, color_system=None, width=80))
    first, second = file.getvalue().splitlines()[:2]
    assert re.search(r"0 streams, 0 frames, 0 mismatches, \d+\.\d s behind$", first), first
    assert second.startswith("  it is locked")
    file.truncate(0)
    with reporting(same_signal_s=1e9):
        assert following().in_json(100, told.append) == "exact"
    assert (told[0]["unreadable"], told[-1]["final"]) == ("it is locked", True)


@pytest.mark.parametrize("number", ENDINGS)
def test_a_signal_ends_it_with_a_report(tmp_path: Path, number: signal.Signals) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    process = WarmProcess(["verify", str(story.path), "--follow", "--json"])
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["frames"] == 5
        process.send_signal(number)
        *_, last = process.communicate()[0].splitlines()
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(last)["summary"] == "verified: 1 stream, 5 frames, exact, 0 mismatches"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_its_status_is_the_verdict_when_its_terminal_closes(tmp_path: Path, options: list[str]) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    terminal, program = pty.openpty()
    process = WarmProcess(["verify", str(story.path), "--follow", *options], output=program)
    try:
        os.close(program)
        with os.fdopen(terminal, "rb", buffering=0) as screen:
            shown = b""
            while b"5 frames" not in shown and b'"frames": 5' not in shown:
                shown += screen.read(1000)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) in (0, 128 + signal.SIGHUP)  # it may notice by itself, just before
    finally:
        process.kill()


@pytest.mark.parametrize("number", ENDINGS)
def test_the_same_signal_once_more_neither_cuts_off_the_report_nor_overturns_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    told: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        signal.raise_signal(number)
        told.append(line)

    with reporting(same_signal_s=1e9):
        assert Following(story.path, None, ()).in_json(100, tell) == "exact"
        signal.raise_signal(number)
    assert told[-1]["final"]


@pytest.mark.parametrize("number", ENDINGS)
def test_a_second_signal_ends_it_at_once_and_is_what_it_says(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)

    def advance(follower: Follower) -> bool:
        for _ in range(2):
            signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(Follower, "advance", advance)
    options: dict[str, Any] = {"model_folder": None, "streams": (), "for_s": 100, "console": Console(width=80)}
    for as_json in (False, True):
        with reporting(same_signal_s=0.0), pytest.raises(Stopped) as stop:
            follow(story.path, json=as_json, **options)
        assert stop.value.code == 128 + number
        said = capsys.readouterr()
        assert said.err == f"not checked: stopped by {number.name}\n"
    *_, last = map(json.loads, said.out.splitlines())
    assert (last["verdict"], last["error"]) == ("not checked", said.err.strip())


def test_a_signal_that_is_ignored_does_not_end_it(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    told: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGHUP)
        told.append(line)

    try:
        assert Following(story.path, None, ()).in_json(1.5, tell) == "exact"
        assert len(told) > 2, "it has ended before its time"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_for_without_follow_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "a.rec"), "--for", "3"])
    assert result.exit_code == 2
    assert "it goes with --follow" in result.output
