"""Streams that are silent for too long: looked for now and then."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.config import LimitsConfig
from instep.core.streams import StreamTable
from instep.server.departures import AT_ONCE
from instep.server.lifecycle import Lifecycle
from instep_client.protocol.codes import Code

_EVERY_TICKS: Final = 10


class Evictions:
    """Ends streams that were silent for too long; where there are many, some now and more at the next tick.

    Args:
        table: the streams.
        lifecycle: ends them.
        limits: how long that is.
    """

    def __init__(self, table: StreamTable, lifecycle: Lifecycle, limits: LimitsConfig) -> None:
        self._table = table
        self._lifecycle = lifecycle
        self._limits = limits
        self._ticks = 0
        self._has_more = False

    @property
    def is_due(self) -> bool:
        """Whether it is time to look."""
        return self._ticks % _EVERY_TICKS == 0

    def tick(self) -> None:
        """A tick has passed."""
        self._ticks += 1

    def look(self, now_ns: int) -> None:
        """Look, if it is time or there was more than could be ended at once."""
        if self.is_due or self._has_more:
            self._evict(now_ns)

    def _evict(self, now_ns: int) -> None:
        limits, table, lifecycle = self._limits, self._table, self._lifecycle
        if lifecycle.departures.is_busy:
            return  # streams that are not parked yet look silent; they have park_s
        idle, unused = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if limits.max_idle_s:
            idle = table.idle_since(now_ns - round(limits.max_idle_s * 1e9))
            lifecycle.evict(idle[:AT_ONCE], Code.IDLE)
        if limits.first_frame_s:
            unused = table.unused_since(now_ns - round(limits.first_frame_s * 1e9))
            lifecycle.evict(unused[:AT_ONCE], Code.NEVER_USED)
        parked = table.parked_since(now_ns - round(limits.park_s * 1e9))
        lifecycle.expire(parked[:AT_ONCE])
        self._has_more = max(len(idle), len(unused), len(parked)) > AT_ONCE
