"""A follower that is late leaves streams out, and one that cannot read tries again."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import cast

import pytest

from instep import background
from instep.recording.errors import UnavailableRecording
from instep.verify import live
from instep.verify.following import Follower
from instep.verify.throttle import Patience, Status, Throttle, follow
from tests.support.growing import Story


class Slow:
    """A follower that is as late as a test says."""

    def __init__(self) -> None:
        self.lag_s, self.share, self.skips = 0.0, 1.0, 0

    def lower_share(self) -> None:
        self.share /= 2

    def raise_share(self) -> None:
        self.share = min(1.0, 2 * self.share)

    def skip(self) -> None:
        self.skips += 1


def test_one_that_is_late_follows_fewer_streams_and_more_when_it_has_time() -> None:
    slow = Slow()
    throttle = Throttle(cast(Follower, slow), 0.0)
    for second in range(1, 13):
        slow.lag_s = 2.5
        throttle.advanced(float(second), 1.0)
    assert slow.share == 1 / 16
    assert slow.skips == 0
    slow.lag_s = 100.0
    throttle.advanced(16.0, 3.0)
    assert (slow.share, slow.skips) == (1 / 32, 1)
    slow.lag_s = 0.1
    throttle.advanced(20.0, 3.0)
    assert slow.share == 1 / 32, "it has no time left"
    for second in range(24, 60, 4):
        throttle.advanced(float(second), 0.5)
    assert slow.share == 1


def test_looks_are_sliced_while_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    follower, over = story.follower(), Event()
    advance, lags, is_sliced = follower.advance, [0.1, 0.6, 1.5, 0.4, 0.1], list[bool]()

    @contextmanager
    def slices() -> Iterator[None]:
        is_sliced[-1] = True
        yield

    def advance_late() -> bool:
        is_all, follower.lag_s = advance(), lags.pop(0)
        if not lags:
            over.set()
        return is_all

    def told(status: Status) -> None:
        is_sliced.append(False)

    monkeypatch.setattr(follower, "advance", advance_late)
    is_sliced.append(False)
    follow(follower, told, over, every_s=0, patience=Patience(pause_s=0.01), slices=slices)
    assert is_sliced[:5] == [False, True, False, False, True], "the first one may have much to read"


def test_a_recording_that_cannot_be_read_for_a_while_is_followed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    story.scribe.writer.close()
    with closing(sqlite3.connect(story.path, isolation_level=None, check_same_thread=False)) as database:
        monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.01))
        follower, looks, over, waited = story.follower(), count(), Event(), list[str]()
        advance = follower.advance

        def told(status: Status) -> None:
            waited.append(status.unreadable)
            assert status.lag_s > 0
            if status.frames == 5:
                over.set()

        def advance_later() -> bool:
            if next(looks) == 2:
                database.execute("ROLLBACK")
            return advance()

        monkeypatch.setattr(follower, "advance", advance_later)
        database.execute("BEGIN EXCLUSIVE")
        follow(follower, told, over, every_s=0, patience=Patience(retry_s=0.05, unreadable_s=0))
        assert next(looks) == 3
        message = f"{story.path} cannot be read now: database is locked; try again"
        assert waited == [message, message, "", ""], "the last one at the end"
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UnavailableRecording, match="try again"):
            follow(follower, told, over, finishes=True)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
        assert live.main([str(story.path)]) == background.AGAIN, "the server starts another process later"
        assert "database is locked; try again" in capfd.readouterr().err
