"""A recording is checked while it grows: nothing that is right is ever called wrong, and what is wrong is found."""

from __future__ import annotations

import gc
import json
import os
from cProfile import Profile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.models.registry import build
from instep.recording.errors import DamagedRecording
from instep.recording.reader import READ_LIMITS, ReadLimits
from instep.recording.records import RecordedEvent
from instep.recording.trim import KEEP_ALL, Retention
from instep.verify.following import Follower
from instep.verify.portion import FollowLimits
from tests.support.forger import Forger
from tests.support.growing import Story, advance
from tests.support.recordings import NO_BITS


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
            advance(Follower(forger.path, story.model, 0))
        forger.change(table, row["position"], time_ns=row["time_ns"])
    follower = Follower(forger.path, story.model, 0)
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


def test_the_file_is_closed_while_the_network_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    story.scribe.writer.close()  # SQLite closes no file that the same process holds locks on
    found: list[bool] = []

    def compile_it(*arguments: Any) -> Any:
        links = Path("/proc/self/fd").iterdir()
        found.append(str(story.path) in map(os.path.realpath, links))
        return build(*arguments)

    monkeypatch.setattr("instep.verify.recorded_model.build", compile_it)
    Follower(story.path, story.model)
    assert found == [False]


@pytest.mark.parametrize("seed", range(3))
def test_where_bits_are_not_promised_the_bound_of_the_verifier_counts(tmp_path: Path, seed: int) -> None:
    story = Story(tmp_path, seed, **NO_BITS)
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
    assert follower.notes == ("the engine computed with torch on cuda:0, which promises no bits",)
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


def test_an_engine_on_another_device_is_held_to_the_bound_from_there_on(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(3)]
    follower = story.follower()
    story.step(*streams, frames=5)
    story.scribe.writer.event(story.scribe.now, "engine", None, json.dumps(NO_BITS))
    story.rounds_otherwise = True
    for _ in range(3):
        story.step(*streams, frames=5)
        story.checkpoint()
    advance(follower)
    assert (follower.mismatches.kept, follower.frames, follower.differs) == ([], 60, True)


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


@pytest.mark.parametrize("changes", [{}, NO_BITS], ids=["bits", "no bits"])
def test_frames_that_the_next_follower_steps_again_count_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    story = Story(tmp_path, **changes)
    streams = [story.open() for _ in range(4)]
    former = story.follower(0)
    story.step(*streams, frames=5)
    story.checkpoint()
    story.step(*streams, frames=5)
    story.scribe.reset(streams[1], story.scribe.random_state())
    story.step(*streams, frames=3)
    advance(former)
    waiting = 4 * 8 - 5 if changes else 0
    assert (former.frames, former.waiting, former.skipped) == (52 - waiting, waiting, 0)
    counted, later = former.frames, former
    for portion_bytes in (100, 400, 2**20):
        limits = FollowLimits(portion_bytes)
        later = Follower(story.path, story.model, later.seen, later.waiting, limits=limits)
        later.advance()
        counted += later.frames if portion_bytes < 2**20 else 0
        assert (later.seen, later.skipped) == (former.seen, 0)
    story.step(*streams, frames=2)
    story.checkpoint()
    advance(later)
    assert counted + later.frames == 60
    assert (later.skipped, later.mismatches.total) == (0, 0)
