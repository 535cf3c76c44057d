"""A recording is checked while it grows: nothing that is right is ever called wrong, and what is wrong is found."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from cProfile import Profile
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep import background
from instep.cli import app
from instep.recording.errors import DamagedRecording, UnavailableRecording
from instep.recording.file import READ_LIMITS, ReadLimits
from instep.recording.records import RecordedEvent
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.verify import live
from instep.verify.follow_command import Following
from instep.verify.following import Follower
from instep.verify.mismatches import StreamNumbers
from instep.verify.portion import FollowLimits
from instep.verify.throttle import Patience, Status, Throttle, follow
from tests.support.forger import Forger
from tests.support.growing import Story
from tests.support.verifying import CERTIFY
from tests.support.warm import WarmProcess

pytestmark = pytest.mark.usefixtures("exact_machine")


def advance(follower: Follower) -> None:
    while not follower.advance():
        pass


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("retention", [KEEP_ALL, Retention(keep_bytes=100_000)], ids=["all", "trimmed"])
def test_what_is_right_is_verified_whatever_happens(tmp_path: Path, seed: int, retention: Retention) -> None:
    story = Story(tmp_path, seed, retention)
    first = story.follower(0)
    followers = [first]
    for turn in range(250):
        story.anything()
        if story.rng.random() < 0.3:
            advance(followers[int(story.rng.integers(len(followers)))])
        if turn % 40 == 39:
            followers.append(story.follower())
            [Follower.lower_share, Follower.raise_share, Follower.skip][story.rng.integers(3)](followers[-2])
    for follower in followers:
        advance(follower)
        before, seen = follower.frames, story.frames
        story.step(*sorted(story.scribe.states)[:8], frames=3)
        advance(follower)
        assert follower.mismatches.kept == []
        assert follower.frames_seen == follower.frames + follower.skipped + follower.waiting
        assert sum(follower.skipped_by.values()) == follower.skipped
        if follower.share == 1:
            assert follower.frames - before >= min(story.frames - seen, 1)
    if first.share == 1 and retention == KEEP_ALL:
        assert first.frames > 0


@pytest.mark.parametrize("seed", range(4))
def test_frames_that_are_trimmed_before_they_are_read_count_as_unchecked(tmp_path: Path, seed: int) -> None:
    story = Story(tmp_path, seed, Retention(keep_bytes=60_000))

    def much() -> None:
        for _ in range(10):
            story.step(*sorted(story.scribe.states)[:8])
            story.anything()
        story.trim()

    story.step(story.open(), frames=3)
    former = story.follower(0)
    advance(former)
    assert (former.frames, former.skipped) == (3, 0)
    much()
    later = Follower(story.path, story.model, former.seen, former.waiting, former.applied, certify=CERTIFY)
    followers = [former, later]
    for turn in range(8):
        for follower in followers[: 2 - turn % 2]:
            advance(follower)
        much()
    story.scribe.writer.abandon()
    story.scribe.writer = RecordingWriter.resume(story.path, story.scribe.writer.header)
    story.step(*sorted(story.scribe.states)[:8])
    story.checkpoint()
    for follower, before in zip(followers, (0, 3), strict=True):
        advance(follower)
        assert follower.frames_seen == story.frames - before, "every frame counts"
        assert sum(follower.skipped_by.values()) == follower.skipped == follower.frames_seen - follower.frames
        assert follower.skipped_by["unchecked"] > 0
        assert follower.mismatches.kept == []
    assert Follower(story.path, story.model, certify=CERTIFY).applied == story.frames


@pytest.mark.parametrize("reading", [READ_LIMITS, ReadLimits(1, 2)], ids=["many rows", "two rows"])
def test_every_frame_of_every_stream_is_compared(tmp_path: Path, reading: ReadLimits) -> None:
    story = Story(tmp_path)
    follower = story.follower(limits=FollowLimits(reading=reading))
    for turn in range(300):
        story.anything()
        if turn % 7 == 0:
            advance(follower)
    advance(follower)
    assert follower.mismatches.kept == []
    assert follower.frames == follower.frames_seen == story.frames


@pytest.mark.parametrize("begins", ["before", "after a checkpoint", "long after"])
def test_one_wrong_output_is_found_with_the_values(tmp_path: Path, begins: str) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(5)]
    follower = story.follower()
    story.step(*streams, frames=20)
    if begins != "before":
        story.checkpoint()
        follower = story.follower()
        story.step(*streams[: 2 if begins == "long after" else 5], frames=3)
    advance(follower)
    assert follower.mismatches.kept == []
    seq = story.scribe.seqs[4]
    story.corrupts = 4
    story.step(*streams)
    story.step(*streams, frames=2)
    advance(follower)
    (found,) = follower.mismatches.kept
    assert (found.stream, found.number, found.seq) == ("stream-4", 4, seq)
    got = story.scribe.y[4][seq]
    np.testing.assert_array_equal(np.array(found.got, np.float32), got)
    got[2] = np.float32(found.expected[2])
    np.testing.assert_array_equal(np.array(found.expected, np.float32), got)
    assert f"frame {seq}, element 2: recorded" in found.sentence
    frames = follower.frames
    story.step(*streams, frames=10)
    advance(follower)
    assert len(follower.mismatches.kept) == 1, "it is told of once"
    assert follower.frames == frames + 40, "the others are still followed"
    story.checkpoint()
    follower.lower_share()
    follower.raise_share()
    story.corrupts = 4
    story.step(*streams)
    advance(follower)
    assert len(follower.mismatches.kept) == 1, "also when more streams are followed again"


@pytest.mark.parametrize("table", ["openings", "batches", "outputs", "closings", "events"])
def test_damage_is_found_in_each_row_of_those_read_together(tmp_path: Path, table: str) -> None:
    story = Story(tmp_path)
    for _ in range(20):
        story.anything()
    for stream in sorted(story.scribe.states)[:2]:
        story.scribe.close(stream)
    story.scribe.writer.close()
    forger = Forger(story.path, tmp_path / "b.rec", fix_crc=False)
    rows = forger.rows(table)
    assert len(rows) > 1
    for row in rows:
        forger.change(table, row["position"], time_ns=row["time_ns"] ^ 256)
        with pytest.raises(
            DamagedRecording, match=f"the row at position {row['position']} .of {table}. does not match"
        ):
            advance(Follower(forger.path, story.model, 0, certify=CERTIFY))
        forger.change(table, row["position"], time_ns=row["time_ns"])
    follower = Follower(forger.path, story.model, 0, certify=CERTIFY)
    advance(follower)
    assert (follower.frames, follower.mismatches.kept) == (story.frames, [])


def test_small_batches_cost_little_python_work_each(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(8)]
    follower = story.follower()
    advance(follower)
    calls: list[int] = []
    for size in (8, 1):
        for _ in range(40):
            for first in range(0, 8, size):
                story.step(*streams[first : first + size])
        profile = Profile()
        profile.runcall(advance, follower)
        calls.append(sum(entry.callcount for entry in profile.getstats() if not isinstance(entry.code, str)))
    assert (follower.frames, follower.mismatches.kept) == (640, [])
    assert calls[1] - calls[0] < 320 - 40, "less than one call each"


def test_the_values_of_a_few_mismatches_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(5)]
    follower = story.follower(limits=FollowLimits(most_kept=2))
    for row in (1, 2, 3):
        story.corrupts = row
        story.step(*streams)
    advance(follower)
    assert follower.mismatches.total == 3
    assert [wrong.number for wrong in follower.mismatches.kept] == [1, 2]


def test_the_file_is_closed_while_the_machine_is_certified(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.scribe.writer.close()  # SQLite closes no file that the same process holds locks on
    found: list[bool] = []

    def certify(*arguments: Any) -> Any:
        links = Path("/proc/self/fd").iterdir()
        found.append(str(story.path) in map(os.path.realpath, links))
        return CERTIFY(*arguments)

    Follower(story.path, story.model, certify=certify)
    assert found == [False]


@pytest.mark.parametrize("seed", range(3))
def test_where_bits_are_not_promised_the_bound_of_the_verifier_counts(tmp_path: Path, seed: int) -> None:
    story = Story(tmp_path, seed, exactness="tolerance")
    story.rounds_otherwise = True
    follower = story.follower()
    for turn in range(300):
        story.anything()
        if turn % 7 == 0:
            advance(follower)
    story.checkpoint()
    advance(follower)
    assert follower.mismatches.kept == []
    assert follower.differs
    assert "exactness tolerance" in follower.notes[0]
    assert 0.5 * story.frames < follower.frames <= story.frames
    skipped = follower.skipped
    story.step(*sorted(story.scribe.states)[:8], frames=5)
    advance(follower)
    assert follower.skipped == skipped, "what waits for a checkpoint is not left out"
    streams = sorted(story.scribe.states)[:3]
    seq = story.scribe.seqs[streams[1]]
    story.corrupts = 2
    story.step(*streams)
    story.step(*streams, frames=2)
    story.checkpoint()
    advance(follower)
    assert [(wrong.number, wrong.seq) for wrong in follower.mismatches.kept] == [(streams[1], seq)]


def test_an_engine_that_withdraws_its_promise_is_held_to_the_bound_from_there_on(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(3)]
    follower = story.follower()
    story.step(*streams, frames=5)
    story.scribe.writer.event(story.scribe.now, "engine", None, '{"exactness": "tolerance"}')
    story.rounds_otherwise = True
    for _ in range(3):
        story.step(*streams, frames=5)
        story.checkpoint()
    advance(follower)
    assert (follower.mismatches.kept, follower.frames, follower.differs) == ([], 60, True)


def test_a_share_of_the_streams_is_stable_and_its_frames_are_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(8)]
    follower = story.follower()
    story.step(*streams, frames=2)
    advance(follower)
    follower.lower_share()
    few = follower.streams
    assert 0 < few < 8
    story.step(*streams, frames=10)
    advance(follower)
    assert follower.frames == 16 + 10 * few
    assert follower.skipped_by == {"not_sampled": 10 * (8 - few)}
    story.checkpoint()
    follower.raise_share()
    story.step(*streams, frames=10)
    advance(follower)
    assert follower.frames == 16 + 10 * few + 80, "those that are new begin with their states in the checkpoint"
    assert follower.mismatches.kept == []


def test_failed_batches_are_forgotten_behind_the_newest_checkpoint(tmp_path: Path) -> None:
    story = Story(tmp_path)
    stream = story.open()
    follower = story.follower()
    before = sum(type(each) is RecordedEvent for each in gc.get_objects())
    for _ in range(5):
        for _ in range(20):
            story.scribe.step([stream], "failed")
        story.step(stream, frames=2)
        story.checkpoint()
        advance(follower)
    story.scribe.step([stream], "failed")
    story.step(stream, frames=2)
    advance(follower)
    assert (follower.frames, follower.mismatches.total, follower.skipped_by) == (12, 0, {})
    assert sum(type(each) is RecordedEvent for each in gc.get_objects()) < before + 20


def test_a_stream_counts_once_although_it_is_followed_anew(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(3)]
    follower = story.follower()
    for _ in range(2):
        story.corrupts = 3
        story.step(*streams)
        advance(follower)
        story.scribe.close(streams.pop())
        streams.append(story.open())
        story.step(*streams, frames=2)
        story.checkpoint()
        follower.skip()
        assert len(follower.mismatches.streams) == 0, "the stream that was wrong has closed, in what was left out"
    advance(follower)
    story.step(*streams)
    advance(follower)
    assert (follower.streams_total, follower.streams, follower.mismatches.total) == (5, 3, 2)


def test_only_the_streams_that_are_named(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(4)]
    follower = Follower(story.path, story.model, wanted=["stream-2", "4"], certify=CERTIFY)
    story.step(*streams, frames=5)
    advance(follower)
    assert (follower.streams, follower.frames) == (2, 10)
    assert follower.skipped_by == {"not_named": 10}


def test_each_reason_why_frames_are_not_compared_is_told(tmp_path: Path) -> None:
    story = Story(tmp_path, exactness="tolerance")
    streams = [story.open() for _ in range(2)]
    follower = story.follower()
    story.step(*streams, frames=5)
    advance(follower)
    assert (follower.frames, follower.skipped, follower.waiting) == (0, 0, 10), "they wait for a checkpoint"
    story.checkpoint()
    advance(follower)
    assert (follower.frames, follower.skipped, follower.waiting) == (10, 0, 0)
    story.step(*streams)
    story.scribe.writer.event(story.scribe.now, "engine", None, '{"exactness": "exact"}')
    story.step(*streams, frames=3)
    advance(follower)
    assert follower.skipped_by == {"state_too_old": 6, "other": 2}, "until the next checkpoint"
    story.checkpoint()
    story.step(*streams, frames=3)
    story.checkpoint()
    follower.skip()
    assert follower.skipped_by == {"state_too_old": 6, "other": 2, "behind": 6}
    story.corrupts = 1
    story.step(*streams)
    advance(follower)
    assert follower.mismatches.total == 1
    story.step(*streams, frames=4)
    advance(follower)
    assert follower.skipped_by["differs"] == 4
    assert sum(follower.skipped_by.values()) == follower.skipped
    status, text = followed(story.path, "--for", "0", "--stream", "stream-2")
    assert (status, "50% compared; " in text) == (0, True), text
    assert re.search(r"\nnot compared: .*\d+ of streams not named.*\nverified: .*; \d+ frames not compared\n", text), (
        text
    )


def test_frames_whose_step_failed_are_not_among_those_that_are_left_out(tmp_path: Path) -> None:
    story = Story(tmp_path, retention=Retention(keep_bytes=60_000))
    streams = [story.open() for _ in range(3)]
    follower = story.follower(0)
    story.scribe.step(streams, "failed")
    story.step(*streams, frames=2)
    story.checkpoint()
    follower.skip()
    assert (follower.frames_seen, follower.skipped_by) == (6, {"behind": 6})
    story.scribe.step(streams, "failed")
    story.step(*streams)
    story.checkpoint()
    follower.skip()
    unread = story.frames
    story.trim()
    story.step(*streams)
    advance(follower)
    assert follower.frames_seen == follower.frames + follower.skipped == story.frames
    assert follower.skipped_by == {"behind": 9, "unchecked": story.frames - unread - follower.frames}


def test_frames_of_closed_streams_and_frames_without_outputs_are_told_apart(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(2)]
    follower = story.follower()
    story.step(*streams)
    story.checkpoint()
    follower.skip()
    story.step(*streams, frames=3)
    story.scribe.close(streams[0])
    story.scribe.step(streams[1:], "unanswered")
    story.scribe.writer.event(story.scribe.now, "recovered", None, "")
    story.scribe.writer.commit()
    advance(follower)
    assert follower.skipped_by == {"behind": 2, "closed": 3, "no_output": 1}
    assert (follower.frames, follower.skipped) == (3, 6)


def test_frames_after_a_mismatch_are_told_as_such_when_their_openings_are_read_again(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(8)]
    follower = story.follower()
    for at in range(1, 9):
        story.corrupts = at
        story.step(*streams)
    advance(follower)
    assert follower.mismatches.total == 8
    before = follower.skipped
    follower.lower_share()
    follower.raise_share()
    story.step(*streams)
    advance(follower)
    assert follower.skipped_by == {"differs": before + 8}


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


def followed(path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(path), "--follow", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("retention", [KEEP_ALL, Retention(keep_bytes=100_000)], ids=["all", "trimmed"])
def test_the_command_follows_a_file_that_grows(tmp_path: Path, retention: Retention) -> None:
    told: list[Story] = []
    ready, over = Event(), Event()

    def grow() -> None:
        story = Story(tmp_path, 1, retention)
        told.append(story)
        ready.set()
        while not over.wait(0.002):
            story.anything()
        story.scribe.writer.commit()
        story.scribe.writer.close()

    writing = Thread(target=grow)
    writing.start()
    try:
        assert ready.wait(60)
        status, text = followed(tmp_path / "a.rec", "--for", "2")
        assert status == 0, text
        *_, summary = text.splitlines()
        (line, *_) = [line for line in text.splitlines() if line.endswith("behind")]
        assert re.fullmatch(r"\d+ streams?, [\d,]+ frames?, 0 mismatches, \d+\.\d s behind", line), text
        assert re.match(r"verified: \d+ streams?, [\d,]+ frames, exact, 0 mismatches", summary), text
        assert max(map(len, text.splitlines())) <= 80
        status, text = followed(tmp_path / "a.rec", "--for", "1.5", "--json")
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
        status, text = followed(forger.path, "--for", "0")
        assert status == expected, text
        assert ("mismatch in stream 3 (stream-3): frame 4, element 0" if fix_crc else "damaged") in text
    assert followed(story.path, "--for", "0")[0] == 0


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
            follow(follower, told, Event(), for_s=0)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
        assert live.main([str(story.path)]) == background.AGAIN, "the server starts another process later"
        assert "database is locked; try again" in capfd.readouterr().err


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
    following().in_words(100, Console(file=file, force_terminal=True, color_system=None, width=80))
    first, second = file.getvalue().splitlines()[:2]
    assert re.search(r"0 streams, 0 frames, 0 mismatches, \d+\.\d s behind$", first), first
    assert second.startswith("  it is locked")
    file.truncate(0)
    assert following().in_json(100, told.append) == "exact"
    assert (told[0]["unreadable"], told[-1]["final"]) == ("it is locked", True)


def test_a_stream_that_was_told_of_is_not_followed_until_it_opens_again(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(4)]
    story.corrupts = 2
    story.step(*streams, frames=5)
    former = story.follower(0)
    advance(former)
    (wrong,) = former.mismatches.kept
    told = former.mismatches.streams.pairs()
    assert told == [(wrong.number, 0)]
    assert len(json.dumps(StreamNumbers([(2**32 - at, 2**40) for at in range(10**6)]).pairs())) < 2**22
    later = Follower(story.path, story.model, former.position, told=told, certify=CERTIFY)
    story.step(*streams, frames=5)
    advance(later)
    assert (later.mismatches.total, later.frames, later.streams) == (0, 15, 3)


@pytest.mark.parametrize("exactness", ["exact", "tolerance"])
def test_frames_that_the_next_follower_steps_again_count_once(tmp_path: Path, exactness: str) -> None:
    story = Story(tmp_path, exactness=exactness)
    streams = [story.open() for _ in range(4)]
    former = story.follower(0)
    story.step(*streams, frames=5)
    story.checkpoint()
    story.step(*streams, frames=5)
    story.scribe.reset(streams[1], story.scribe.random_state())
    story.step(*streams, frames=3)
    advance(former)
    waiting = {"exact": 0, "tolerance": 4 * 8 - 5}[exactness]
    assert (former.frames, former.waiting, former.skipped) == (52 - waiting, waiting, 0)
    counted, later = former.frames, former
    for portion_bytes in (100, 400, 2**20):
        limits = FollowLimits(portion_bytes)
        later = Follower(story.path, story.model, later.seen, later.waiting, certify=CERTIFY, limits=limits)
        later.advance()
        counted += later.frames if portion_bytes < 2**20 else 0
        assert (later.seen, later.skipped) == (former.seen, 0)
    story.step(*streams, frames=2)
    story.checkpoint()
    advance(later)
    assert counted + later.frames == 60
    assert (later.skipped, later.mismatches.total) == (0, 0)


def test_each_mismatch_is_told_and_none_again_by_the_next_follower(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(40)]
    former, told = story.follower(0, FollowLimits(most_kept=35)), list[int]()
    for stream in streams:
        story.corrupts = 1
        story.step(stream)
        story.step(stream)
    story.scribe.close(streams[0])
    story.scribe.writer.commit()
    follow(former, lambda status: told.extend(wrong.number for wrong in status.mismatches), Event(), for_s=0)
    assert told == streams[:35]
    assert (former.mismatches.total, len(former.mismatches.streams)) == (40, 40)
    later = Follower(story.path, story.model, former.position, told=former.mismatches.streams.pairs(), certify=CERTIFY)
    story.step(*streams[1:9], frames=5)
    advance(later)
    assert (later.mismatches.total, later.frames) == (0, 0), "although all is read again, as there is no checkpoint"
    assert streams[0] in later.mismatches.streams
    story.checkpoint()
    advance(later)
    assert [number for number, _ in later.mismatches.streams.pairs()] == streams[1:]


def test_a_stream_is_told_of_once_where_two_parts_of_it_are_wrong(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(2)]
    follower = story.follower(0)
    for _ in range(2):
        story.corrupts = 1
        story.step(*streams, frames=3)
        story.scribe.reset(streams[0], story.scribe.random_state())
    story.step(*streams, frames=3)
    advance(follower)
    assert ([wrong.number for wrong in follower.mismatches.kept], follower.mismatches.total) == ([streams[0]], 1)
    assert follower.streams == 1
    story.step(*streams, frames=3)
    advance(follower)
    assert follower.skipped_by == {"differs": 3}


def test_ctrl_c_ends_it_with_a_report(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.step(story.open(), frames=5)
    process = WarmProcess(["verify", str(story.path), "--follow", "--json"])
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["frames"] == 5
        process.send_signal(signal.SIGINT)
        *_, last = process.communicate()[0].splitlines()
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(last)["summary"] == "verified: 1 stream, 5 frames, exact, 0 mismatches"


def test_for_without_follow_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "a.rec"), "--for", "3"])
    assert result.exit_code == 2
    assert "it goes with --follow" in result.output
