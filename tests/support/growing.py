"""A recording that grows: an engine does all it can into it, in random order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.replay.following import Follower
from instep.replay.live_check import LiveCheck
from tests.support.recordings import make_gru, record_gru, served_step
from tests.support.scribe import F32, Scribe


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
        self.network = PortableNetwork(self.model)
        self.path = where / "a.rec"
        writer = RecordingWriter.create(self.path, model.header, retention)
        self.rng = np.random.default_rng(seed)
        self.corrupts = 0
        """Which of the rows of the next step get another output, counted from 1; 0 for none."""
        self.scribe = Scribe(writer, self._step(served_step(self.network)), seed=seed)
        self.frames = 0
        """That were applied."""
        self._last = self._position = self._checkpoint = 0

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
        """Of all that was stepped, unless the newest one is."""
        if self._position == self._checkpoint:
            return
        self._checkpoint = self._position
        self.scribe.checkpoint(self._position)
        self.scribe.writer.commit()

    def trim(self) -> None:
        """Step all streams, eight at most, until the history begins later."""
        writer = self.scribe.writer
        before = writer.trimmed
        while writer.trimmed == before:
            self.step(*sorted(self.scribe.states), frames=20)
            self.checkpoint()
            while writer.trim(self.scribe.now):
                pass
            writer.commit()

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

    def check(self, position: int = 0, applied: int | None = 0) -> LiveCheck:
        """A live check of it."""
        return LiveCheck(self.path, self.network, position, applied)


def look(check: Follower) -> None:
    """Until everything that is recorded was taken in."""
    while not check.look():
        pass
