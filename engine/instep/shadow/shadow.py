"""A candidate version on a share of the streams that another version serves, and how its outputs differ."""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import F32, I64
from instep.recording.errors import UnavailableRecording
from instep.recording.tail import Closed, Item, Opened, RecordingTail
from instep.runtime.stepper import Stepper
from instep.shadow.report import Differences, StreamDifference
from instep.streaming.replaying import WarmUpReplay

_LATE_S: Final = 2.0
"""Time that the frames recorded between two looks should take at most."""
_NEVER: Final = 2**62
_PARTS: Final = 8
"""Bins of differences for each doubling."""
_SMALLEST: Final = -64
_BINS: Final = 128 * _PARTS
"""From 2^-64 to 2^64; the first one counts 0 too, the last one all that is not finite."""


class Shadow(WarmUpReplay):
    """Steps what is recorded of some streams in a candidate, and compares its outputs with the recorded ones.

    Args:
        path: the recording of the version that is served.
        stepper: of the candidate, with `most_streams` slots.
        warm_up: None to begin with the states of the version that is served; N to begin with the N newest frames of
            each stream, which are not compared.
        share: of the streams; whether one is followed depends on its name alone.
        most_streams: followed at the same time.
        most_listed: streams in a report.
    """

    def __init__(
        self,
        path: Path,
        stepper: Stepper,
        warm_up: int | None,
        share: float,
        most_streams: int,
        most_listed: int,
    ) -> None:
        super().__init__(path, stepper, most_streams, warm_up)
        self._most_listed = most_listed
        self.dropped = 0
        """Streams that were given up because the candidate could not keep up, or left out because there were more."""
        self._dropped = set[int]()
        """The numbers of those that are open: where the recording is trimmed, all that are open are met again."""
        self.unavailable: UnavailableRecording | None = None
        """Why the recording could not be read at the last look."""
        self._share = share
        self._names = [""] * (most_streams + 1)
        self._compared_from: I64 = np.full(most_streams + 1, _NEVER, np.int64)
        self._frames_of: I64 = np.zeros(most_streams + 1, np.int64)
        self._largest_of = np.zeros(most_streams + 1)
        self._past: list[StreamDifference] = []
        """Streams whose slots others have now, those that differ most."""
        self._past_count = 0
        self._frames_total = self._equal = 0
        self._largest = self._total = 0.0
        self._bins: I64 = np.zeros(_BINS, np.int64)

    @property
    def following(self) -> int:
        """Count of streams that are followed now."""
        return len(self._slots)

    def follow(self) -> int:
        """As that of the base, but while another program locks the recording, nothing is stepped until a later call."""
        try:
            frames = super().follow()
        except UnavailableRecording as error:
            self.unavailable = error
            return 0
        self.unavailable = None
        return frames

    def keep_up(self) -> None:
        """Step everything that was committed by now; where that takes too long, give up half of the streams.

        Raises:
            RecordingError: as `follow`.
        """
        began, was_read = time.monotonic(), self.unavailable is None
        self.follow()
        if time.monotonic() - began > _LATE_S and was_read and self.unavailable is None:
            self.drop_half()

    def drop_half(self) -> None:
        """Give up half of the streams: the candidate cannot keep up."""
        numbers = sorted(self._slots)[::2]
        for number in numbers:
            self._release(number)
            self._drop(number)

    def report(self, candidate: str) -> Differences:
        """Findings so far."""
        present = [self._difference(slot) for slot in np.flatnonzero(self._frames_of).tolist()]
        frames, largest = self._frames_total, self._largest
        edges = 2.0 ** ((np.arange(_BINS) + 1) / _PARTS + _SMALLEST)
        counts = np.cumsum(self._bins)
        quantiles = {}
        for share in (0.5, 0.9, 0.99):
            found = int(np.searchsorted(counts, share * frames)) if frames else 0
            quantiles[share] = min(float(edges[found]), largest) if found else 0.0
        values = frames * self._stepper.model.description.outputs
        return Differences(
            recording=str(self._path),
            candidate=candidate,
            frames=frames,
            equal=self._equal,
            largest=largest,
            mean=self._total / values if values else 0.0,
            quantiles=quantiles,
            streams=self._worst([*self._past, *present]),
            streams_total=self._past_count + len(present),
            dropped=self.dropped,
        )

    def _take(self, item: Item, tail: RecordingTail) -> None:
        super()._take(item, tail)
        if isinstance(item, Closed):
            self._dropped.discard(item.stream)

    def _begin(self, tail: RecordingTail) -> int:
        self._dropped &= set(tail.newest_open(_NEVER))  # the closings of others may have been trimmed
        return super()._begin(tail)

    def _wants(self, opened: Opened) -> bool:
        is_chosen = zlib.crc32(opened.name.encode()) < self._share * 2**32
        if is_chosen and not self._free:
            self._drop(opened.stream)
        return is_chosen and bool(self._free)

    def _drop(self, number: int) -> None:
        """A stream is not followed; it counts once."""
        self.dropped += number not in self._dropped
        self._dropped.add(number)

    def _opened(self, slot: int, name: str) -> None:
        if self._frames_of[slot]:
            self._past.append(self._difference(slot))
            self._past_count += 1
            if len(self._past) > 2 * self._most_listed:
                self._past = self._worst(self._past)
        self._names[slot], self._frames_of[slot], self._largest_of[slot] = name, 0, 0

    def _began(self, slots: I64, seqs: I64) -> None:
        self._compared_from[slots] = seqs

    def _stepped(self, slots: I64, seqs: I64, y: F32, recorded: F32) -> None:
        counts = seqs >= self._compared_from[slots]
        slots, y, recorded = slots[counts], y[counts], recorded[counts]
        if not len(slots):
            return
        equal = (y.view(np.uint32) == recorded.view(np.uint32)).all(axis=1)
        with np.errstate(invalid="ignore"):
            apart = np.abs(y.astype(np.float64) - recorded)
        apart[equal] = 0  # infinity minus infinity is not a number
        apart[~np.isfinite(apart)] = np.inf
        largest = apart.max(axis=1)
        self._frames_total += len(slots)
        self._largest = max(self._largest, float(largest.max()))
        self._equal += int(equal.sum())
        self._total += float(apart.sum())
        self._frames_of[slots] += 1
        self._largest_of[slots] = np.maximum(self._largest_of[slots], largest)
        with np.errstate(divide="ignore"):
            bins = np.ceil((np.log2(largest) - _SMALLEST) * _PARTS) - 1
        np.add.at(self._bins, np.clip(bins, 0, _BINS - 1).astype(np.int64), 1)

    def _difference(self, slot: int) -> StreamDifference:
        return StreamDifference(self._names[slot], int(self._frames_of[slot]), float(self._largest_of[slot]))

    def _worst(self, streams: list[StreamDifference]) -> list[StreamDifference]:
        return sorted(streams, key=lambda each: -each.largest)[: self._most_listed]
