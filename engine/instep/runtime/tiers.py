"""Hot, warm and cold: states on the device, in host memory and in the recording, moved in batches as streams step."""

from __future__ import annotations

import numpy as np

from instep.core.residency import NO_ROW, Residency
from instep.core.typing import F32, I64
from instep.runtime.bounded_store import BoundedStore
from instep.runtime.state_cache import StateCache
from instep.runtime.warm_store import WarmStore


class Tiers:
    """Keeps the state of every slot in one place: a row of the device (hot), or what is behind it, host memory (warm).

    Host memory may have a bound, and then a third place behind it, the recording (cold): see `BoundedStore`.

    A state is copied first and its place is changed afterwards, and a copy goes only to where no state is. So when a
    copy fails, even halfway, every state is still whole where `Residency` says it is.

    Args:
        hot: the rows of the device; nobody else may give them out.
        warm: the host's memory.
        residency: which slot is hot; none is at first.
    """

    def __init__(self, hot: StateCache, warm: WarmStore | BoundedStore, residency: Residency) -> None:
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

    @property
    def bounded(self) -> BoundedStore | None:
        """Host memory, where it has a bound."""
        return self._warm if isinstance(self._warm, BoundedStore) else None

    def make_hot(self, slots: I64) -> I64:
        """Bring the states of a batch to the device, and those of other slots, least recently used, away from there.

        Args:
            slots: int64 [B], distinct, at most as many as there are rows.

        Returns:
            Their rows, int64 [B].

        Raises:
            StateLost: when the recording does not hold states that it should; no other state has changed.
            Exception: when states could not be copied or read; no state has changed.
        """
        rows = self._residency.use(slots)
        missing = np.flatnonzero(rows == NO_ROW)
        if len(missing):
            coming = self._warm.fetch(slots[missing])
            self._make_room(len(missing))
            fresh = self._residency.free_rows(len(missing))
            self._hot.write(fresh, coming)
            self._residency.occupy(fresh, slots[missing])
            self._warm.leave(slots[missing])
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

    def leave_cold(self, slots: I64) -> None:
        """The recording holds the states of slots, and memory nothing of them: int64 [N], distinct."""
        self._warm.leave(slots)
        self._residency.forget(slots)

    def read(self, slots: I64) -> F32:
        """The states of slots, wherever they are: float32 [N, layers, size], a copy.

        Raises:
            StateLost: when the recording does not hold states that it should.
            Exception: when it cannot be read.
        """
        rows = self._residency.rows(slots)
        is_hot = rows != NO_ROW
        if not is_hot.any():
            return self._warm.read(slots)
        states = self._hot.read(rows)
        if not is_hot.all():
            states[~is_hot] = self._warm.read(slots[~is_hot])
        return states
