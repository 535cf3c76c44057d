"""A candidate on a history that grows, is trimmed, and cannot always be read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instep.recording.errors import UnavailableRecording
from instep.recording.trim import Retention
from instep.shadow.command import Shadowing, make_shadow, run
from tests.support.growing import Story


def before_each_query(monkeypatch: pytest.MonkeyPatch, then: Callable[[str], None]) -> None:
    """Do something before each query on what is opened from now on."""

    class Connection(sqlite3.Connection):
        def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
            then(query)
            return super().execute(query, *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))


def test_a_history_that_is_trimmed_while_it_is_read_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path, retention=Retention(keep_bytes=500_000))
    for _ in range(4):
        story.open()
    story.trim()
    trims_left = 0

    def trim_first(query: str) -> None:
        nonlocal trims_left
        if trims_left and "FROM outputs" in query:
            trims_left -= 1
            story.trim()

    before_each_query(monkeypatch, trim_first)
    asked = Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=None, tolerance=None, json=True)
    shadow = make_shadow(asked)
    for begins, trims in ((True, 2), (False, 2), (False, 0)):
        trims_left = trims
        before, compared = story.frames, shadow.report("").frames
        story.step(1, 2, 3, 4, frames=9)
        shadow.follow()
        assert (trims_left, shadow.following) == (0, 4)
        found = shadow.report("")
        assert begins or found.frames - compared == story.frames - before, "none is left out"
        assert found.largest < 1e-5
    newest = story.scribe.writer.position
    while story.scribe.writer.trimmed.position <= newest:
        story.trim()
    shadow.follow()
    assert shadow.following == 4, "it begins again with the newest states"
    story.step(1, 2, 3, 4, frames=9)
    compared = shadow.report("").frames
    shadow.follow()
    assert shadow.report("").frames == compared + 36


def test_streams_that_are_left_out_count_once_although_a_trimmed_history_begins_anew(tmp_path: Path) -> None:
    story = Story(tmp_path, retention=Retention(keep_bytes=100_000))
    streams = [story.open() for _ in range(7)]
    story.step(*streams)
    asked = Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=None, tolerance=None, json=True)
    shadow = make_shadow(asked, most_streams=4)
    shadow.follow()
    for dropped in (3, 3, 4):
        newest = story.scribe.writer.position
        while story.scribe.writer.trimmed.position <= newest:
            story.trim()
        if dropped == 4:
            story.scribe.close(streams[-1])
            story.open()
            story.scribe.writer.commit()
        shadow.follow()
        assert (shadow.following, shadow.dropped) == (4, dropped)


def test_streams_that_come_and_go_between_two_looks_are_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    staying = [story.open(), story.open()]
    asked = Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=None, tolerance=None, json=True)
    shadow = make_shadow(asked, most_streams=4, most_listed=5)
    shadow.follow()
    for number in range(60):
        coming = [story.open(), story.open()]
        story.step(*staying, *coming)
        story.corrupts = 3 if number == 40 else 0
        story.step(*coming, *staying[1:], frames=2)
        story.scribe.reset(coming[1], story.scribe.random_state())
        for stream in coming:
            story.step(*coming)
            story.scribe.close(stream)
            coming = [each for each in coming if each != stream]
        if number % 20 == 10:
            shadow.follow()
    story.scribe.writer.commit()
    shadow.follow()
    report = shadow.report("")
    assert (report.frames, report.streams_total, report.dropped) == (story.frames, 122, 0)
    assert [(each.name, each.frames) for each in report.streams[:1]] == [("stream-2", 180)]
    assert report.largest == report.streams[0].largest == pytest.approx(0.25, abs=1e-5)
    assert len(report.streams) == 5
    assert report.streams[1].largest < 1e-5


def test_frames_that_a_killed_server_left_without_outputs_are_stepped_and_not_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    stream = story.open()
    story.step(stream, frames=3)
    story.scribe.step([stream], "unanswered")
    story.scribe.writer.event(story.scribe.now, "recovered", None, "")
    story.step(stream, frames=3)
    for warm_up in (None, 5):
        asked = Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=warm_up, tolerance=None, json=True)
        shadow = make_shadow(asked)
        shadow.follow()
        compared = shadow.report("").frames
        assert compared == (6 if warm_up is None else 0)
        story.step(stream, frames=4)
        shadow.follow()
        report = shadow.report("")
        assert report.frames == compared + 4
        assert warm_up or report.largest < 1e-5


def test_a_recording_that_cannot_be_read_for_a_while_is_followed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, calls = Story(tmp_path), count()
    story.step(story.open(), story.open(), frames=20)
    asked = Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=None, tolerance=None, json=True)
    shadow, looks = make_shadow(asked), 0

    def lock_later(query: str) -> None:
        if "LIMIT" in query and next(calls) == looks:
            error = sqlite3.OperationalError("it is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    before_each_query(monkeypatch, lock_later)
    while shadow.follow() == 0:
        assert str(shadow.unavailable) == f"{story.path} cannot be read now: it is locked; try again"
        looks, calls = looks + 1, count()
    assert (shadow.unavailable, shadow.report("").frames, shadow.report("").dropped) == (None, 40, 0)
    assert shadow.report("").largest < 1e-5
    assert looks > 10
    looks, calls = 0, count(-3)
    with pytest.raises(UnavailableRecording, match="it is locked"):
        run(asked, Console(file=StringIO()))
