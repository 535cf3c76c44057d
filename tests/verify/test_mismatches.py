"""A follower tells of each stream that is wrong once, also when another follower takes over."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

from instep.verify.following import Follower
from instep.verify.mismatches import StreamNumbers
from instep.verify.portion import FollowLimits
from instep.verify.throttle import follow
from tests.support.growing import Story, advance


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
    assert (follower.streams, follower.mismatches.total) == (3, 2)


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
    later = Follower(story.path, story.model, former.position, told=told)
    story.step(*streams, frames=5)
    advance(later)
    assert (later.mismatches.total, later.frames, later.streams) == (0, 15, 3)


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
    over = Event()
    over.set()
    follow(former, lambda status: told.extend(wrong.number for wrong in status.mismatches), over, finishes=True)
    assert told == streams[:35]
    assert (former.mismatches.total, len(former.mismatches.streams)) == (40, 40)
    later = Follower(story.path, story.model, former.position, told=former.mismatches.streams.pairs())
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
