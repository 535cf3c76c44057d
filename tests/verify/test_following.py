"""A recording is checked while it grows: nothing that is right is ever called wrong, and what is wrong is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.models.folder import load_model
from instep.models.recurrent.network import RecurrentNetwork
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.verify.following import Follower
from tests.support.recordings import make_gru, record_gru, served_step
from tests.support.scribe import F32, Scribe
from tests.support.verifying import CERTIFY

pytestmark = pytest.mark.usefixtures("exact_machine")


class Story:
    """An engine that does all it can, in random order, into a recording.

    Args:
        where: a folder.
        seed: of what happens.
        retention: how much history is kept.
    """

    def __init__(self, where: Path, seed: int = 0, retention: Retention = KEEP_ALL, **changes: Any) -> None:
        model = record_gru(where / "model", make_gru(3, 8, layers=2), [1], changes=changes)
        self.model = load_model(model.folder)
        self.folder = model.folder
        self.network = RecurrentNetwork(self.model, torch.device("cpu"))
        bucket = next(bucket for bucket in model.header.buckets if bucket >= 8)
        self.path = where / "a.rec"
        writer = RecordingWriter.create(self.path, model.header, retention)
        self.rng = np.random.default_rng(seed)
        self.corrupts = 0
        """Which of the rows of the next step get another output, counted from 1; 0 for none."""
        self.scribe = Scribe(writer, self._step(served_step(self.network)), bucket=bucket, seed=seed)
        self.frames = 0
        """That were applied."""
        self._last = self._position = 0

    def _step(self, honest: Any) -> Any:
        def step(x: F32, h: F32) -> tuple[F32, F32]:
            y, after = honest(x, h)
            if self.corrupts:
                y[self.corrupts - 1, 2] += np.float32(0.25)
                self.corrupts = 0
            return y, after

        return step

    def open(self) -> int:
        """A new stream."""
        self._last += 1
        state = self.scribe.random_state() if self.rng.random() < 0.5 else None
        self.scribe.open(self._last, state, first_seq=int(self.rng.integers(3)))
        return self._last

    def step(self, *streams: int, frames: int = 1) -> None:
        """Frames of these streams, committed."""
        for _ in range(frames):
            self._position = self.scribe.step(streams)
        self.frames += frames * len(streams)
        self.scribe.writer.commit()

    def checkpoint(self) -> None:
        """Of all that was stepped."""
        self.scribe.checkpoint(self._position)
        self.scribe.writer.commit()

    def anything(self) -> None:
        """Something that an engine does."""
        scribe, streams = self.scribe, sorted(self.scribe.states)
        what = self.rng.integers(12)
        if what == 0 or not streams:
            self.open()
        elif what == 1 and len(streams) > 4:
            scribe.close(int(self.rng.choice(streams)))
        elif what == 2:
            stream = int(self.rng.choice(streams))
            scribe.reset(stream, scribe.random_state() if self.rng.random() < 0.5 else None)
        elif what == 3:
            self.checkpoint()
            while scribe.writer.trim(scribe.now):
                pass
        elif what == 4:
            scribe.step(streams[:3], "failed")
        else:
            chosen = self.rng.permutation(streams)[: self.rng.integers(1, 9)].tolist()
            self.step(*chosen, frames=int(self.rng.integers(1, 6)))
        scribe.writer.commit()

    def follower(self, start: int | None = None) -> Follower:
        """A follower of it."""
        return Follower(self.path, self.model, start, CERTIFY)


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
        assert follower.mismatches == []
        assert follower.frames_seen >= follower.frames
        if follower.share == 1:
            assert follower.frames - before >= min(story.frames - seen, 1)
    if first.share == 1 and retention == KEEP_ALL:
        assert first.frames > 0


def test_every_frame_of_every_stream_is_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    follower = story.follower()
    for turn in range(300):
        story.anything()
        if turn % 7 == 0:
            advance(follower)
    advance(follower)
    assert follower.mismatches == []
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
    assert follower.mismatches == []
    seq = story.scribe.seqs[4]
    story.corrupts = 4
    story.step(*streams)
    story.step(*streams, frames=2)
    advance(follower)
    (found,) = follower.mismatches
    assert (found.stream, found.number, found.seq) == ("stream-4", 4, seq)
    got = story.scribe.y[4][seq]
    np.testing.assert_array_equal(np.array(found.got, np.float32), got)
    got[2] = np.float32(found.expected[2])
    np.testing.assert_array_equal(np.array(found.expected, np.float32), got)
    assert f"frame {seq}, element 2: recorded" in found.sentence
    frames = follower.frames
    story.step(*streams, frames=10)
    advance(follower)
    assert len(follower.mismatches) == 1, "it is told of once"
    assert follower.frames == frames + 40, "the others are still followed"
