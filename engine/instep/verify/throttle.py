"""Keeping up with a recording: how many of its streams are followed, and what is reported meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import inf
from threading import Event
from typing import Any, Final

from instep.recording.errors import UnavailableRecording
from instep.verify.following import Follower
from instep.verify.mismatches import WrongOutput

LATE_S: Final = 2.0
"""Behind the newest commit by more than this, fewer streams are followed."""
_HURRY_S: Final = 0.5
"""Behind by more than this, a look is not sliced."""
LOST_S: Final = 20.0
"""Behind by more than this, everything up to the newest checkpoint is left out."""
LEAST_SHARE: Final = 2.0**-10
_CHANGE_S: Final = 3.0
"""The least time that a share lasts before it changes again."""
_IDLE: Final = 0.4
"""Busy for less than this share of its time, a follower can take on more streams."""
_MOST_TOLD: Final = 16
"""Mismatches in one status, which has their values; more are told in the statuses that follow at once."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a follower waits, and what it waits for."""

    pause_s: float = 0.2
    """From one look at the file to the next."""
    retry_s: float = 1.0
    """The same after a look at which the file could not be read."""
    unreadable_s: float = 10.0
    """A file that could not be read for longer than this is told of; a passing lock is not."""


PATIENCE: Final = Patience()


@dataclass(frozen=True, slots=True)
class Status:
    """Findings of a follower by now."""

    frames: int
    """Frames that were compared."""
    skipped: int
    """Frames committed meanwhile and not compared: of streams that are not followed, and where it was late."""
    skipped_by: dict[str, int]
    """These by the reason (`left_out.Reason`)."""
    waiting: int
    """Frames that are read and compared once a checkpoint is there."""
    streams: int
    """Open streams that are followed."""
    share: float
    """The share of streams that are followed, by a hash of their names."""
    lag_s: float
    position: int
    """Everything in the recording up to here was read."""
    applied: int
    """How many frames were applied up to there since the recording began."""
    mismatches: tuple[WrongOutput, ...]
    """Those since the last status, as far as their values are kept; where there are many, the first few."""
    mismatches_total: int
    notes: tuple[str, ...]
    """Why bits need not be equal; empty where they must."""
    unreadable: str = ""
    """Why the recording has not been read for a while; empty where it is."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; values that are not finite become strings."""
        return asdict(self) | {
            "share": round(self.share, 6),
            "lag_s": round(self.lag_s, 3),
            "mismatches": [wrong.as_json() for wrong in self.mismatches],
        }


class Throttle:
    """Lets a follower keep up: it follows fewer streams when it falls behind, and more when it has time.

    Args:
        follower: what keeps up.
        now_s: the time.
    """

    def __init__(self, follower: Follower, now_s: float) -> None:
        self._follower = follower
        self._since_s = now_s
        self._busy_s = 0.0

    def advanced(self, now_s: float, took_s: float) -> None:
        """The follower has advanced, for this many seconds."""
        follower = self._follower
        self._busy_s += took_s
        seconds = now_s - self._since_s
        if seconds < _CHANGE_S:
            return
        is_idle = self._busy_s < _IDLE * seconds
        self._since_s, self._busy_s = now_s, 0.0
        if follower.lag_s > LATE_S:
            if follower.share > LEAST_SHARE:
                follower.lower_share()
            if follower.lag_s > LOST_S:
                follower.skip()
        elif is_idle:
            follower.raise_share()


def follow(
    follower: Follower,
    on_status: Callable[[Status], None],
    stopped: Event,
    *,
    every_s: float = 1.0,
    finishes: bool = False,
    patience: Patience = PATIENCE,
    slices: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Follow until it is stopped.

    Args:
        follower: what is at the beginning.
        on_status: called every so often, also while the recording cannot be read, and once more at the end.
        stopped: ends it.
        every_s: how often.
        finishes: check everything that was committed by then when it is stopped, too.
        patience: how long it waits between looks.
        slices: entered for each look after one that read everything in a moment, so there is time for rests.

    Raises:
        UnavailableRecording: when the recording cannot be read at the end; meanwhile that is tried again.
        RecordingError: when it cannot be read at all, or is damaged.
        CannotVerify: when the model cannot be computed here.
    """
    told = read = time.monotonic()
    throttle, count, ends, is_all = Throttle(follower, told), 0, inf, False

    def tell(unreadable: str = "", unread_s: float = 0.0) -> None:
        nonlocal count
        is_more = True
        while is_more:
            status = _status(follower, count)
            on_status(replace(status, unreadable=unreadable, lag_s=status.lag_s + unread_s))
            count += len(status.mismatches)
            is_more = count < len(follower.mismatches.kept)

    try:
        while finishes or not stopped.is_set():
            before = time.monotonic()
            ends = min(ends, before) if stopped.is_set() else ends
            is_sliced = is_all and follower.lag_s < _HURRY_S and before < ends
            clock = time.thread_time if is_sliced else time.monotonic  # rests between slices are no work
            began = clock()
            try:
                with slices() if is_sliced else nullcontext():
                    is_all = follower.advance()
                now = read = time.monotonic()
                throttle.advanced(now, clock() - began)
            except UnavailableRecording as error:
                if before >= ends:
                    raise
                now = time.monotonic()
                if now - read > patience.unreadable_s and now - told >= every_s:
                    told = now
                    tell(str(error), now - read)
                stopped.wait(patience.retry_s)
                continue
            if now - told >= every_s or len(follower.mismatches.kept) > count:
                told = now
                tell()
            if is_all:
                if before >= ends:
                    return
                stopped.wait(min(patience.pause_s, max(0.0, ends - now)))
    finally:
        tell()


def _status(follower: Follower, known: int) -> Status:
    return Status(
        frames=follower.frames,
        skipped=follower.skipped,
        skipped_by=follower.skipped_by,
        waiting=follower.waiting,
        streams=follower.streams,
        share=follower.share,
        lag_s=follower.lag_s,
        position=follower.seen,
        applied=follower.applied,
        mismatches=tuple(follower.mismatches.kept[known:][:_MOST_TOLD]),
        mismatches_total=follower.mismatches.total,
        notes=follower.notes,
    )
