"""States in host memory when that holds fewer than there are streams: the recording holds the others."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from instep.core.residency import NO_ROW, Residency
from instep.core.typing import F32, I64, Bool


class NoRoom(Exception):
    """States cannot be put into host memory, since none may leave it: the recording does not hold them yet."""


class ColdStates(Protocol):
    """What is in the recording."""

    def is_kept(self, slots: I64) -> Bool:
        """Whether it holds the states as they are, so that they may leave memory: int64 [N] → bool [N]."""

    def read(self, slots: I64) -> F32:
        """States of slots, as the network knows them: float32 [N, layers, hidden size].

        Raises:
            StateLost: when it should hold states and does not.
            Exception: when it cannot be read now.
        """


class BoundedStore:
    """What `WarmStore` does, with a bound: float32 [rows, layers, size] in host memory, zeros at first.

    A state is in one of three places: a row here, nowhere (`blank`: zeros, until its stream is stepped), or in the
    recording (cold). Rows of the states that were used longest ago are given to others, but only where the recording
    holds the state as it is.

    Args:
        max_streams: slots run from 1 to this.
        rows: states held at once.
        layers: layers of the network.
        size: state of one layer, as the network keeps it (padding included).
        cold: the recording.
    """

    def __init__(self, max_streams: int, rows: int, layers: int, size: int, cold: ColdStates) -> None:
        self._states: F32 = np.zeros((rows + 1, layers, size), np.float32)
        self._residency = Residency(max_streams, rows)
        self._blank: Bool = np.zeros(max_streams + 1, np.bool_)
        self._cold = cold
        self.states_fetched_total = 0
        """States read from the recording to be stepped so far."""
        self.states_dropped_total = 0
        """States that left memory, because the recording holds them, so far."""

    @property
    def slots(self) -> I64:
        """Slots whose states are here, those of streams that have closed meanwhile included; 0 for a free row."""
        return self._residency.slot[1:]

    def read(self, slots: I64) -> F32:
        """States of slots: float32 [N, layers, size], a copy.

        Raises:
            Exception: as `ColdStates.read`.
        """
        rows = self._residency.rows(slots)
        states: F32 = np.take(self._states, rows, 0)
        cold = np.flatnonzero((rows == NO_ROW) & ~self._blank[slots])
        if len(cold):
            found = self._cold.read(slots[cold])
            states[cold, :, : found.shape[2]] = found
        return states

    def fetch(self, slots: I64) -> F32:
        """As `read`, for states that are about to be stepped; those that are here are needed, so they stay."""
        rows = self._residency.use(slots)
        states = self.read(slots)
        self.states_fetched_total += int(np.count_nonzero((rows == NO_ROW) & ~self._blank[slots]))
        return states

    def write(self, slots: I64, states: F32) -> None:
        """Keep states: int64 [N], distinct, float32 [N, layers, size]. Those that the recording holds may be dropped.

        Raises:
            NoRoom: when there is none; nothing has changed.
        """
        rows = self._residency.use(slots)
        new = self._with_room(np.flatnonzero(rows == NO_ROW), slots)
        fresh = self._residency.free_rows(len(new))
        rows[new] = fresh
        here = rows != NO_ROW
        self._states[rows[here]] = states[here]
        self._residency.occupy(fresh, slots[new])
        self._blank[slots] = False

    def _with_room(self, new: I64, slots: I64) -> I64:
        """Make room for states; which of them get it: places in `slots`, int64 [≤ N]."""
        residency, wanted = self._residency, len(new)
        lacking = wanted - residency.free_count
        if lacking <= 0:
            return new
        going = residency.least_recently_used(lacking, self._cold.is_kept)
        room = residency.free_count + len(going)
        if room < wanted:
            are_kept = self._cold.is_kept(slots[new])
            must = new[~are_kept]
            if len(must) > room:
                raise NoRoom(
                    f"host memory has no room for {len(must)} states: those in it have changed since the last snapshot"
                )
            new = np.concatenate([must, new[are_kept][: room - len(must)]])
        residency.vacate(going)
        self.states_dropped_total += len(going) + wanted - len(new)
        return new

    def clear(self, slots: I64) -> None:
        """Set slots to zeros, which take no room: int64 [N], distinct."""
        self._residency.forget(slots)
        self._blank[slots] = True

    def leave(self, slots: I64) -> None:
        """The states are elsewhere now, on the device or in the recording: int64 [N], distinct."""
        self._residency.forget(slots)
        self._blank[slots] = False
