"""Recorded values compared with values computed again: bits, distances, and the first difference of every row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8, Bool
from instep.models.base import StateSpec
from instep.replay.bound import F64, LeafLimits, Leaves, Limits, absolute_error, largest_errors
from instep.replay.report import Checker, Divergence, Place

Values: TypeAlias = npt.NDArray[Any]
"""Elements of one leaf, or outputs."""


class Comparison:
    """How some streams' recorded values differ from those that one checker computed.

    An element is wrong when any bit differs, where bits are required, and otherwise when it is farther off than its
    limit. Where the limit is lossy (see `bound`), an element beyond it is not wrong but undecided.

    Args:
        checker: the name of the checker.
        rows: how many streams.
        bits_required: whether bits must be equal.

    Attributes:
        differs: [R]: whether any bit differs; of `add_distance`, whether any element is beyond its limit.
        wrong: [R]: whether any element is wrong.
        first: by row, the first wrong element; where there is none, the first that differs.
        undecided: by row, the seq of the first frame that is undecided.
        max_error: [R]: largest absolute difference, but of elements that are undecided.
        elements: how many elements were compared.
    """

    def __init__(self, checker: Checker, rows: int, bits_required: bool) -> None:
        self.checker = checker
        self.bits_required = bits_required
        self.differs: Bool = np.zeros(rows, np.bool_)
        self.wrong: Bool = np.zeros(rows, np.bool_)
        self.first: dict[int, Divergence] = {}
        self.undecided: dict[int, int] = {}
        self.max_error: F64 = np.zeros(rows)
        self.elements = 0

    def replace(self, rows: I64, other: Comparison, *, elements: bool = True) -> None:
        """Replace everything found in `rows` by another comparison of them; its elements count too if `elements`."""
        self.elements += other.elements if elements else 0
        self.differs[rows], self.wrong[rows] = other.differs, other.wrong
        self.max_error[rows] = other.max_error
        for at, row in enumerate(rows.tolist()):
            self.first.pop(row, None)
            if at in other.first:
                self.first[row] = other.first[at]
            self.undecided.pop(row, None)
            if at in other.undecided:
                self.undecided[row] = other.undecided[at]

    def add_replay(self, starts: I64, recorded: F32, replayed: F32, valid: Bool, limits: Limits) -> None:
        """Compare outputs with a replay's.

        Args:
            starts: [R]: seqs of the first timestep.
            recorded: [T, R, outputs].
            replayed: [T, R, outputs].
            valid: [T, R]: whether there is something to compare.
            limits: of [T, R].
        """
        differ = _bits_differ(recorded, replayed) & valid[:, :, None]
        self.elements += int(valid.sum()) * recorded.shape[2]
        for row in np.flatnonzero(differ.any(axis=(0, 2))).tolist():
            at, elements = np.nonzero(differ[:, row])
            values = recorded[at, row, elements], replayed[at, row, elements]
            found = Limits(limits.distance[at, row], limits.lossy[at, row])
            self._add(row, *values, found, starts[row] + at, elements, "output")

    def add_replayed_state(
        self,
        row: int,
        seq: int,
        spec: StateSpec,
        recorded: U8,
        replayed: U8,
        limits: LeafLimits,
        place: Place = "final state",
    ) -> None:
        """Compare a stream's state [row_bytes] before the frame `seq` with a replay's.

        Leaves without limits must be equal.
        """
        for leaf, first, values, others in _leaves(spec, recorded, spec.unpack(replayed[None])):
            elements = np.flatnonzero(_bits_differ(values, others))
            self.elements += values.size
            if count := len(elements):
                distance, lossy = _limit(limits, leaf, row)
                found = Limits(np.full(count, distance), np.full(count, lossy))
                both = values[elements], others[elements]
                self._add(row, *both, found, np.full(count, seq), first + elements, place)

    def add_distance(self, starts: I64, recorded: F32, truth: Values, valid: Bool, limits: Limits) -> None:
        """Compare outputs with those of another program, whose bits count for nothing; arguments as in `add_replay`."""
        self.elements += int(valid.sum()) * recorded.shape[2]
        error = np.where(valid, largest_errors(recorded, truth), 0)
        self.max_error = np.maximum(self.max_error, np.where(limits.lossy, 0, error).max(axis=0))
        beyond = error > limits.distance
        for row in np.flatnonzero(beyond.any(axis=0)).tolist():
            at = int(np.argmax(beyond[:, row]))
            values, nearest = recorded[at, row], truth[at, row]
            element = int(np.argmax(absolute_error(values, nearest) > limits.distance[at, row]))
            seq, lossy = int(starts[row]) + at, bool(limits.lossy[at, row])
            self._add_miss(row, values[element], nearest[element], lossy, seq, element, "output")

    def add_true_state(
        self,
        row: int,
        seq: int,
        spec: StateSpec,
        recorded: U8,
        truth: Leaves,
        limits: LeafLimits,
        place: Place = "final state",
    ) -> None:
        """Compare a state [row_bytes] before the frame `seq` with the reference's, by leaf; limits as above."""
        for leaf, first, values, nearest in _leaves(spec, recorded, truth):
            self.elements += values.size
            distance, lossy = _limit(limits, leaf, row)
            error: F64 = (values != nearest).astype(np.float64)
            if leaf in limits:
                error = absolute_error(values, nearest.astype(np.float64))
                if not lossy:
                    self.max_error[row] = max(self.max_error[row], error.max())
            beyond = np.flatnonzero(error > distance)
            if len(beyond):
                element = int(beyond[0])
                self._add_miss(row, values[element], nearest[element], lossy, seq, first + element, place)

    def _add(
        self, row: int, recorded: Values, replayed: Values, limits: Limits, frames: I64, elements: I64, place: Place
    ) -> None:
        """Add the elements of a row that differ, in order."""
        error = absolute_error(recorded, replayed.astype(np.float64))
        if recorded.dtype.kind != "f":
            error = np.maximum(error, 1)  # they differ, though float64 may not tell
        beyond = error > limits.distance
        undecided = beyond & limits.lossy & (not self.bits_required)
        if undecided.any():
            self.undecided.setdefault(row, int(frames[np.argmax(undecided)]))
        self.max_error[row] = max(self.max_error[row], np.where(undecided, 0, error).max())
        wrong = (beyond & ~limits.lossy) | self.bits_required
        newly_wrong = bool(wrong.any()) and not self.wrong[row]
        if newly_wrong or not self.differs[row]:
            at = int(np.argmax(wrong))
            values = float(recorded[at]), float(replayed[at])
            self.first[row] = Divergence(self.checker, place, int(frames[at]), int(elements[at]), *values)
        self.differs[row] = True
        self.wrong[row] |= newly_wrong

    def _add_miss(
        self, row: int, recorded: Any, truth: Any, lossy: bool, frame: int, element: int, place: Place
    ) -> None:
        """Add the first element of a row that is too far from the truth."""
        if lossy:
            self.undecided.setdefault(row, frame)
            return
        if not self.wrong[row]:
            self.first[row] = Divergence(self.checker, place, frame, element, float(recorded), float(truth))
        self.differs[row] = self.wrong[row] = True


def _leaves(spec: StateSpec, recorded: U8, others: Leaves) -> Iterator[tuple[str, int, Values, Values]]:
    """Each leaf of a state: its name, the index of its first element in the state, and its elements on both sides."""
    ours, first = spec.unpack(recorded[None]), 0
    for leaf in spec.leaves:
        yield leaf.name, first, ours[leaf.name].reshape(-1), others[leaf.name].reshape(-1)
        first += leaf.elements


def _limit(limits: LeafLimits, leaf: str, row: int) -> tuple[float, bool]:
    """The limit of a row's leaf; (0, False), so that values must be equal, where there is none."""
    found = limits.get(leaf)
    return (0.0, False) if found is None else (float(found.distance[row]), bool(found.lossy[row]))


def _bits_differ(one: Values, other: Values) -> Bool:
    """Elementwise, of one shape and dtype."""
    bits = f"u{one.itemsize}"
    differ: Bool = one.view(bits) != other.view(bits)
    return differ


def differ(one: F32, other: F32) -> Bool:
    """Whether any bit differs, by row of [N, values]."""
    bits: Bool = _bits_differ(one, other)
    differs: Bool = np.asarray(bits.any(axis=1))
    return differs
