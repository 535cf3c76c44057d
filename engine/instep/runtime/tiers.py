"""Hot and warm: states on the device and in host memory, moved in batches as streams are stepped."""

from __future__ import annotations

import numpy as np

from instep.core.residency import NO_ROW, Residency
from instep.core.typing import F32, I64
from instep.runtime.state_cache import StateCache
from instep.runtime.warm_store import WarmStore


class Tiers:
    """Keeps the state of every slot in one of two places: a row of the device (hot) or host memory (warm).

    A state is copied first and its place is changed afterwards, and a copy goes only to where no state is. So when a
    copy fails, even halfway, every state is still whole where `Residency` says it is.

    Args:
        hot: the rows of the device; nobody else may give them out.
        warm: the host's memory, with room for all slots.
        residency: which slot is where; all are warm at first.
    """

    def __init__(self, hot: StateCache, warm: WarmStore, residency: Residency) -> None:
        self._hot = hot
        self._warm = warm
        self._residency = residency
        self.states_loaded_total = 0
        """States copied to the device so far."""
        self.states_spilled_total = 0
        """States copied from the device to make room for others so far."""

    @property
    def hot_slots(self) -> I64:
        """Slots that are hot, those of streams that have closed meanwhile included; 0 for a free row: int64 [rows]."""
        return self._residency.slot[1:]

    def make_hot(self, slots: I64) -> I64:
        """Bring the states of a batch to the device, and those of other slots, least recently used, away from there.

        Args:
            slots: int64 [B], distinct, at most as many as there are rows.

        Returns:
            Their rows, int64 [B].

        Raises:
            Exception: when states could not be copied; no state has changed.
        """
        rows = self._residency.use(slots)
        missing = np.flatnonzero(rows == NO_ROW)
        if len(missing):
            self._make_room(len(missing))
            fresh = self._residency.free_rows(len(missing))
            self._hot.write(fresh, self._warm.read(slots[missing]))
            self._residency.occupy(fresh, slots[missing])
            self.states_loaded_total += len(missing)
            rows[missing] = fresh
        return rows

    def _make_room(self, count: int) -> None:
        lacking = count - self._residency.free_count
        if lacking > 0:
            rows = self._residency.least_recently_used(lacking)
            self._warm.write(self._residency.slot[rows], self._hot.read(rows))
            self._residency.vacate(rows)
            self.states_spilled_total += lacking

    def load(self, slots: I64, states: F32 | None) -> None:
        """Give slots a state: zeros, or float32 [N, layers, size]. They are warm until they are stepped."""
        if states is None:
            self._warm.clear(slots)
        else:
            self._warm.write(slots, states)
        self._residency.forget(slots)

    def read(self, slots: I64) -> F32:
        """The states of slots, wherever they are: float32 [N, layers, size], a copy."""
        states = self._warm.read(slots)
        rows = self._residency.row[slots]
        hot = np.flatnonzero(rows != NO_ROW)
        if len(hot):
            states[hot] = self._hot.read(rows[hot])
        return states
