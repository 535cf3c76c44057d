"""Rechecks in service: rows of served batches are stepped again in another bucket, and every bit is compared.

Certification tries batch sizes with rows of its own; this tries them with the rows that are served. The states before
the sampled step are copied, and stepped again once the batch has been answered, so that no answer waits for it.

All of it happens where the steps do, which may be a forked process: what it finds is in memory that both share.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from instep.core.tables import Tables, seqs_of
from instep.core.typing import F32, I64, U8, U32, float32_zeros
from instep.models.ulp import bits_differ
from instep.runtime.stepper import Stepper

_MOST_ROWS: Final = 32
_FIELDS: Final = ("slot", "incarnation", "seq", "bucket", "other_bucket", "part", "element", "served", "again")
"""Of a mismatch."""
_REPORT: Final = np.dtype(
    [
        ("rechecked", "<i8"),  # frames
        ("mismatches", "<i8"),  # of them, those with other bits
        ("failures", "<i8"),  # rechecks that raised, so that nothing was compared
        ("is_new", "<i8"),  # the fields below hold a mismatch that nobody has taken yet
        *((name, "<f8" if name in ("served", "again") else "<i8") for name in _FIELDS),
    ]
)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A frame that was served with other bits than another bucket gives, and its first value that differs."""

    slot: int
    incarnation: int
    """As `StreamTable.incarnations`, which tells whether the slot still has the same stream."""
    seq: int
    bucket: int
    """In which it was served."""
    other_bucket: int
    part: str
    """`output`, or the leaf of the state; in a report its number, 0 for the output."""
    element: int
    served: float
    again: float


@dataclass(slots=True)
class _Sample:
    """Rows of a step: what it was given and, once it has ended, what it gave."""

    rows: I64
    slots: I64
    bucket: int
    other_bucket: int
    incarnations: U32
    seqs: I64
    x: F32
    before: U8
    y: F32
    after: U8


class Recheck:
    """Steps served batches, and rechecks some rows of every Nth one.

    A recheck is one step of at most twice as many rows as the batch has, unless every other bucket is larger. Half of
    its rows at most are sampled ones, so that rows which depend on others meet other ones; the rest is what the recheck
    before had sampled.

    Args:
        stepper: steps.
        tables: the frame buffer, and which streams the slots belong to; in shared memory where the steps are forked.
        every: how many batches from one recheck to the next; 0 for none.
        zeros: makes the memory of what is found; see `StateStore`.
    """

    def __init__(
        self,
        stepper: Stepper,
        tables: Tables,
        every: int,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self._stepper = stepper
        self._tables = tables
        self._every = self._left = every
        self._random = np.random.default_rng()
        self._reports = zeros((2 * _REPORT.itemsize // 4,)).view(_REPORT)
        """Of the process that made this, and of the one that is forked from it: both may step."""
        self._made_in = os.getpid()
        self._sample: _Sample | None = None
        self._x_beside: F32 = np.zeros((1, tables.x.shape[1]), np.float32)
        self._states_beside = stepper.state.initial(1)

    # ── Where steps run ────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, slots: I64, rows: I64) -> None:
        """Step streams, int64 [B], with the frames in these rows of the frame buffer; raises as `Stepper.step`."""
        x, y = self._tables.x, self._tables.y
        self._left -= 1
        is_due = self._left == 0  # it is below 0 where there are no rechecks
        if is_due:
            self._left = self._every
        if not is_due or self._sample is not None:
            self._stepper.step(slots, rows, x, y)
            return
        sample = self._draw(slots, rows)
        self._stepper.step(slots, rows, x, y)
        try:
            sample.y, sample.after = y[sample.rows], self._stepper.read(sample.slots)
        except Exception:  # the frames were applied all the same
            self._report["failures"] += 1
            return
        self._sample = sample

    def _draw(self, slots: I64, rows: I64) -> _Sample:
        bucket = self._stepper.bucket(len(slots))
        other_bucket = self._other_bucket(bucket)
        most = min(_MOST_ROWS, -(-len(slots) // 2), max(1, other_bucket // 2))
        chosen = self._random.permutation(len(slots))[:most]
        slots, rows = slots[chosen], rows[chosen]
        x, y = self._tables.x[rows], self._tables.y[rows]
        incarnations, seqs = self._tables.streams["first_generation"][slots], seqs_of(self._tables, slots, rows)
        before = self._stepper.read(slots)
        return _Sample(rows, slots, bucket, other_bucket, incarnations, seqs, x, before, y, before)

    def _other_bucket(self, bucket: int) -> int:
        others = [other for other in self._stepper.buckets if other != bucket] or [bucket]
        near = [other for other in others if other <= 2 * bucket] or others[:1]
        return near[self._random.integers(len(near))]

    def run(self) -> None:
        """Step the rows again that were sampled, if any were; their batch has been answered."""
        sample, self._sample = self._sample, None
        if sample is None:
            return
        places = self._random.permutation(sample.other_bucket)[: len(sample.x)]
        beside = self._random.integers(len(self._x_beside), size=sample.other_bucket)
        x, states = self._x_beside[beside], self._states_beside[beside]
        x[places], states[places] = sample.x, sample.before
        self._x_beside, self._states_beside = sample.x, sample.before
        try:
            y, after = self._stepper.step_again(sample.other_bucket, x, states)
        except Exception:  # where this lasts, the next batch of that size fails and says why
            self._report["failures"] += 1
            return
        self._compare(sample, y[places], after[places])

    def _compare(self, sample: _Sample, y: F32, after: U8) -> None:
        unpack, count = self._stepper.state.unpack, len(y)
        parts = [(sample.y, y), *zip(unpack(sample.after).values(), unpack(after).values(), strict=True)]
        differ = [bits_differ(served, again).reshape(count, -1) for served, again in parts]
        wrong = np.any([each.any(axis=1) for each in differ], axis=0)
        report = self._report
        report["rechecked"] += count
        if not wrong.any():
            return
        if not report["is_new"]:
            row = int(np.argmax(wrong))
            part = next(number for number, each in enumerate(differ) if each[row].any())
            element = int(np.argmax(differ[part][row]))
            served, again = (float(values.reshape(count, -1)[row, element]) for values in parts[part])
            stream = (sample.slots[row], sample.incarnations[row], sample.seqs[row])
            found = (*stream, sample.bucket, sample.other_bucket, part, element, served, again)
            for name, value in zip(_FIELDS, found, strict=True):
                report[name] = value
            report["is_new"] = 1  # last: the other process looks at it first
        report["mismatches"] += int(wrong.sum())

    @property
    def _report(self) -> Any:
        """Of this process."""
        return self._reports[0 if os.getpid() == self._made_in else 1]

    # ── In the loop's thread ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def frames(self) -> int:
        """Count of frames that were rechecked."""
        return int(self._reports["rechecked"].sum())

    @property
    def mismatches(self) -> int:
        """Count of those that had other bits."""
        return int(self._reports["mismatches"].sum())

    @property
    def failures(self) -> int:
        """Count of rechecks that raised."""
        return int(self._reports["failures"].sum())

    def take_mismatch(self) -> Mismatch | None:
        """One that was found since the last call, if there was any."""
        for report in self._reports:
            if report["is_new"]:
                found = {name: report[name].item() for name in _FIELDS}
                report["is_new"] = 0
                parts = ("output", *(leaf.name for leaf in self._stepper.state.leaves))
                return Mismatch(**{**found, "part": parts[found["part"]]})
        return None
