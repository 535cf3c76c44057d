"""Recorded against computed again: bits, distances, and the first difference of every row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instep.core.typing import F32, I64, Bool
from instep.models.ulp import ulp_distance
from instep.verify.bound import F64, absolute_error, as_float32, largest_errors
from instep.verify.report import ULP_BINS, Divergence, Place, Way, ulp_bins


class Comparison:
    """What differs between some streams' recorded values and one way of computing them again.

    An element is wrong when it is farther off than its limit, or, where bits are required, when any bit differs.

    Args:
        way: which way.
        rows: how many streams.
        bits_required: whether bits must be equal.
        is_presumed: whether that is only presumed: then nothing is found out of what differs but that it does.

    Attributes:
        differs: [R]: whether any bit differs (for the reference: whether any element is wrong).
        wrong: [R]: whether any element is wrong.
        first: by row, the first wrong element; where there is none, the first that differs.
        max_ulp: [R].
        max_error: [R]: largest absolute difference.
        ulps: elements by distance, see `ULP_BINS`; replays only.
        is_refuted: whether a bit differs that was presumed to be equal.
    """

    def __init__(self, way: Way, rows: int, bits_required: bool, *, is_presumed: bool = False) -> None:
        self.way = way
        self.bits_required = bits_required
        self._is_presumed = is_presumed
        self.is_refuted = False
        self.differs: Bool = np.zeros(rows, np.bool_)
        self.wrong: Bool = np.zeros(rows, np.bool_)
        self.first: dict[int, Divergence] = {}
        self.max_ulp: I64 = np.zeros(rows, np.int64)
        self.max_error: F64 = np.zeros(rows)
        self.ulps: I64 = np.zeros(ULP_BINS, np.int64)

    @classmethod
    def side_by_side(cls, blocks: Sequence[Comparison]) -> Comparison:
        """Those of some rows each, of one way, as one."""
        joined = cls(blocks[0].way, sum(len(block.wrong) for block in blocks), blocks[0].bits_required)
        first = 0
        for block in blocks:
            of = slice(first, first + len(block.wrong))
            joined.differs[of], joined.wrong[of] = block.differs, block.wrong
            joined.max_ulp[of], joined.max_error[of] = block.max_ulp, block.max_error
            joined.first |= {first + row: divergence for row, divergence in block.first.items()}
            joined.ulps += block.ulps
            first = of.stop
        return joined

    def add_replay(self, starts: I64, recorded: F32, replayed: F32, valid: Bool, limit: F64) -> None:
        """Compare outputs with a replay's.

        Args:
            starts: [R]: seqs of the first timestep.
            recorded: [T, R, outputs].
            replayed: [T, R, outputs].
            valid: [T, R]: whether there is something to compare.
            limit: [T, R]: how far off an element may be.
        """
        unequal = recorded.view(np.uint32) != replayed.view(np.uint32)
        frames = unequal.any(axis=2) & valid
        self.ulps[0] += int(valid.sum()) * recorded.shape[2]
        for row in np.flatnonzero(frames.any(axis=0)).tolist():
            at, elements = np.nonzero(unequal[:, row] & valid[:, row, None])
            self.ulps[0] -= len(elements)
            values = recorded[at, row, elements], replayed[at, row, elements]
            self._add(row, *values, limit[at, row], starts[row] + at, elements, "output")

    def add_replayed_state(
        self, row: int, seq: int, recorded: F32, replayed: F32, limit: float, place: Place = "final state"
    ) -> None:
        """Compare a stream's last state [layers, hidden size], before the frame `seq`, with a replay's."""
        flat, other = recorded.reshape(-1), np.ascontiguousarray(replayed).reshape(-1)
        elements = np.flatnonzero(flat.view(np.uint32) != other.view(np.uint32))
        self.ulps[0] += flat.size - len(elements)
        if len(elements):
            at, limits = np.full(len(elements), seq), np.full(len(elements), limit)
            self._add(row, flat[elements], other[elements], limits, at, elements, place)

    def add_truth(self, starts: I64, recorded: F32, truth: F64, valid: Bool, limit: F64) -> None:
        """Compare outputs with the float64 reference's; arguments as in `add_replay`."""
        error = np.where(valid, largest_errors(recorded, truth), 0)
        self.max_error = np.maximum(self.max_error, error.max(axis=0))
        wrong = error > limit
        for row in np.flatnonzero(wrong.any(axis=0)).tolist():
            at = int(np.argmax(wrong[:, row]))
            values, nearest = recorded[at, row], truth[at, row]
            element = int(np.argmax(absolute_error(values, nearest) > limit[at, row]))
            self._miss(row, values[element], nearest[element], int(starts[row]) + at, element, "output")

    def add_true_state(
        self, row: int, seq: int, recorded: F32, truth: F64, limit: float, place: Place = "final state"
    ) -> None:
        """Compare a last state [layers, hidden size], before the frame `seq`, with the float64 reference's."""
        error = absolute_error(recorded, truth).reshape(-1)
        self.max_error[row] = max(self.max_error[row], error.max())
        wrong = np.flatnonzero(error > limit)
        if len(wrong):
            element = int(wrong[0])
            values = recorded.reshape(-1)[element], truth.reshape(-1)[element]
            self._miss(row, *values, seq, element, place)

    def _add(
        self, row: int, recorded: F32, replayed: F32, limit: F64, frames: I64, elements: I64, place: Place
    ) -> None:
        """Take in the elements of a row that differ, in order."""
        if self._is_presumed:
            self.is_refuted = True
            return
        ulps = ulp_distance(recorded, replayed)
        error = absolute_error(recorded, replayed.astype(np.float64))
        self.max_ulp[row] = max(self.max_ulp[row], ulps.max())
        self.max_error[row] = max(self.max_error[row], error.max())
        self.ulps += ulp_bins(ulps)
        wrong = (error > limit) | self.bits_required
        newly_wrong = bool(wrong.any()) and not self.wrong[row]
        if newly_wrong or not self.differs[row]:
            at = int(np.argmax(wrong))
            values = float(recorded[at]), float(replayed[at])
            self.first[row] = Divergence(self.way, place, int(frames[at]), int(elements[at]), *values, int(ulps[at]))
        self.differs[row] = True
        self.wrong[row] |= newly_wrong

    def _miss(self, row: int, recorded: np.float32, truth: np.float64, frame: int, element: int, place: Place) -> None:
        """Take in the first element of a row that is too far from the truth."""
        if not self.wrong[row]:
            ulp = int(ulp_distance(np.array([recorded]), as_float32(np.array([truth])))[0])
            self.first[row] = Divergence(self.way, place, frame, element, float(recorded), float(truth), ulp)
        self.differs[row] = self.wrong[row] = True
