"""Streams, their rings and the rules that admit frames, without sockets or a network.

Its network adds up: the output of a frame is the sum of the first values of all frames of its stream so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from instep.core.rings import Rings
from instep.core.verdict import Admission

from instep.core.admission import admit
from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, U64

OWNER = 1
FEATURES = 2


def u64(*values: int) -> U64:
    """Handles, seqs or what is acknowledged."""
    return np.array(values, np.uint64)


def frames(values: Sequence[float]) -> F32:
    """One column of frames that begin with these values: float32 [T, 1, 2]."""
    x = np.ones((len(values), 1, FEATURES), np.float32)
    x[:, 0, 0] = values
    return x


class CoreStreams:
    """A table with its rings; what the engine does between them, step by step.

    Args:
        window: frames of a ring.
        max_streams: how many streams may be open.
        max_pending: frames that may be pending, of all streams together.
    """

    def __init__(self, window: int = 4, max_streams: int = 8, max_pending: int = 1000) -> None:
        self.table = StreamTable(max_streams, max_owners=4, last_epoch=100)
        self.rings = Rings(self.table, window, max_streams, FEATURES, 1, max_pending)
        self._state = np.zeros(max_streams + 1, np.float32)

    def open(self, *names: str, owner: int = OWNER, first_seqs: Sequence[int] | None = None) -> tuple[I64, U64]:
        """Slots and handles of new streams."""
        first = None if first_seqs is None else np.array(first_seqs, np.int64)
        slots, codes = self.table.open(names, owner, now_ns=0, first_seqs=first)
        assert not codes.any()
        return slots, self.table.slots.handles(slots)

    def admit(self, handles: U64, seqs: U64, x: F32, acked: U64 | None = None, owner: int = OWNER) -> Admission:
        """Judge a block that acknowledges nothing unless told what; what is admitted is pending then."""
        acked = np.zeros(len(handles), np.uint64) if acked is None else acked
        verdict = admit(self.table, self.rings, owner, handles, seqs, acked, x)
        self.rings.append(verdict, x, block=0)
        self.table.admitted(*verdict.admitted, now_ns=0)
        return verdict

    def step(self, slots: I64) -> I64:
        """Compute one pending frame of each slot; the slots that have more."""
        (rows,) = self.rings.take(slots)
        self._state[slots] += self.rings.x[rows, 0]
        self.rings.y[rows, 0] = self._state[slots]
        self.rings.applied(slots)
        return self.rings.let_go(slots)

    def compute(self, slots: I64) -> None:
        """Compute and answer everything that is pending of these slots."""
        busy = slots
        while len(busy := busy[self.table.next_seq[busy] > self.table.step_seq[busy]]):
            self.step(busy)
        self.table.pending[slots] = 0
