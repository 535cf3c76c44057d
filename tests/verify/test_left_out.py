"""Frames that a follower does not compare are counted by the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.verify.following import Follower
from tests.support.growing import Story, advance
from tests.support.recordings import NO_BITS


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
    later = Follower(story.path, story.model, former.seen, former.waiting, former.applied)
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
    assert Follower(story.path, story.model).applied == story.frames


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


def test_each_reason_why_frames_are_not_compared_is_told(tmp_path: Path) -> None:
    story = Story(tmp_path, **NO_BITS)
    streams = [story.open() for _ in range(2)]
    follower = story.follower()
    story.step(*streams, frames=5)
    advance(follower)
    assert (follower.frames, follower.skipped, follower.waiting) == (0, 0, 10), "they wait for a checkpoint"
    story.checkpoint()
    advance(follower)
    assert (follower.frames, follower.skipped, follower.waiting) == (10, 0, 0)
    story.step(*streams)
    story.scribe.writer.event(story.scribe.now, "engine", None, '{"arithmetic": "portable-1"}')
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
