"""An engine of a few lines that records what it does, and remembers what that was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.recording.records import StateRows
from instep.recording.writer import RecordingWriter
from tests.support.rows import close_stream, open_stream, stream_event
from tests.support.states import rows_of

F32: TypeAlias = npt.NDArray[np.float32]
Step: TypeAlias = Callable[[F32, F32], tuple[F32, F32]]
"""x [B, features], h [L, B, H] -> y [B, outputs], h' [L, B, H]."""
Outcome: TypeAlias = Literal["computed", "unanswered", "failed"]

START_NS = 1_700_000_000_000_000_000


class Scribe:
    """Streams by their numbers, each with the state it has now.

    Args:
        writer: where it records.
        step: what computes.
        seed: of the frames.
        magnitude: of the frames, which stay finite.
        tick_ns: of the clock, between rows.

    Attributes:
        magnitudes: of the frames of some streams.
    """

    def __init__(
        self,
        writer: RecordingWriter,
        step: Step,
        *,
        seed: int = 0,
        magnitude: float = 1.0,
        tick_ns: int = 1000,
    ) -> None:
        self.writer = writer
        self.states: dict[int, F32] = {}
        self.seqs: dict[int, int] = {}
        self.y: dict[int, dict[int, F32]] = {}
        """The outputs of every frame that was applied, by stream and seq."""
        self.x: dict[int, dict[int, F32]] = {}
        self.rng = np.random.default_rng(seed)
        self._step = step
        self._magnitude = magnitude
        self.magnitudes: dict[int, float] = {}
        self._now = START_NS
        self._tick_ns = tick_ns
        self._dirty: set[int] = set()

    @property
    def now(self) -> int:
        self._now += self._tick_ns
        return self._now

    def set_back(self, by_ns: int) -> None:
        """Set the clock back."""
        self._now -= by_ns

    def open(
        self, stream: int, state: F32 | None = None, *, first_seq: int = 0, name: str = "", epoch: int = 0
    ) -> None:
        opened = (name or f"stream-{stream}", epoch or 1000 + stream, first_seq)
        open_stream(self.writer, stream, *opened, self.now, state)
        header = self.writer.header
        zeros = np.zeros(header.state_spec.leaves[0].shape, np.float32)
        self.states[stream] = zeros if state is None else state
        self.seqs[stream] = first_seq
        self.x[stream], self.y[stream] = {}, {}

    def random_state(self) -> F32:
        header = self.writer.header
        return self.rng.uniform(-1, 1, header.state_spec.leaves[0].shape).astype(np.float32)

    def step(self, streams: Sequence[int], outcome: Outcome = "computed") -> int:
        """One batch of these streams; its position."""
        header, size = self.writer.header, len(streams)
        magnitudes = np.array([self.magnitudes.get(stream, self._magnitude) for stream in streams])
        largest = np.finfo(np.float32).max
        frames = magnitudes[:, None] * self.rng.standard_normal((size, header.features))
        x = np.clip(frames, -largest, largest).astype(np.float32)
        h = np.stack([self.states[stream] for stream in streams], axis=1)
        seqs = [self.seqs[stream] for stream in streams]
        numbers = np.array(streams, np.uint32)
        batch = self.writer.add_inputs(self.now, numbers, np.array(seqs, np.uint64), x)
        if outcome == "failed":
            self.writer.fail_batch(self.now, batch, "step_failed: out of luck")
            return batch
        y, after = self._step(x, h)
        if outcome == "computed":
            self.writer.add_outputs(self.now, batch, y)
        for at, stream in enumerate(streams):
            self.states[stream] = np.ascontiguousarray(after[:, at])
            self.x[stream][seqs[at]], self.y[stream][seqs[at]] = x[at], y[at]
            self.seqs[stream] += 1
        self._dirty.update(streams)
        return batch

    def reset(self, stream: int, state: F32 | None = None) -> None:
        stream_event(self.writer, self.now, "reset", stream, self.seqs[stream], "", state)
        self.states[stream] = np.zeros_like(self.states[stream]) if state is None else state
        self._dirty.add(stream)

    def checkpoint(
        self, through: int, tail: int = 2, *, only: Sequence[int] | None = None, is_part: bool = False
    ) -> None:
        """States of all streams that have changed, or `only` some, as they are now, with so many frames of each."""
        streams = sorted(self._dirty & self.states.keys() & set(self.states if only is None else only))
        record = self.writer.add_states if is_part else self.writer.checkpoint
        record(self.now, through, self._rows(streams, tail))
        self._dirty -= set(streams)

    def _rows(self, streams: Sequence[int], tail: int) -> StateRows:
        seqs = np.array([self.seqs[stream] for stream in streams], np.int64)
        first = np.array([max(self.seqs[each] - tail, min(self.x[each], default=self.seqs[each])) for each in streams])
        frames = [
            (stream, seq)
            for stream, begin, end in zip(streams, first.tolist(), seqs.tolist(), strict=True)
            for seq in range(begin, end)
        ]
        header = self.writer.header
        states = np.zeros((len(streams), *header.state_spec.leaves[0].shape), np.float32)
        for at, stream in enumerate(streams):
            states[at] = self.states[stream]
        return StateRows(
            np.array(streams, np.int64),
            seqs,
            rows_of(states),
            first.astype(np.int64),
            np.array([self.x[stream][seq] for stream, seq in frames], np.float32).reshape(-1, header.features),
            np.array([self.y[stream][seq] for stream, seq in frames], np.float32).reshape(-1, header.outputs),
        )

    def close(self, stream: int, time_ns: int | None = None) -> None:
        state = self.states.pop(stream)
        close_stream(self.writer, stream, time_ns or self.now, "closed by its client", self.seqs[stream], state)
