"""The record of one stream: its state, its next seq and its rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from instep.core.typing import F64, I64, U32
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks
from instep_client.protocol.codes import Place

SLICE: Final = 32_768
"""Slots whose columns are looked at before the loop gets its turn."""
PAUSE_S: Final = 0.0005
"""The least time that the loop gets then."""
_EVERY_S: Final = 1.0
_LEAST_NS: Final = 500_000_000
_WANTED_S: Final = 10.0
"""Time for which rates are measured after somebody has asked for them."""


class _Seqs:
    """The seqs of all slots at about one time."""

    def __init__(self, slots: int) -> None:
        self.seqs: I64 = np.zeros(slots, np.int64)
        self.incarnations: U32 = np.zeros(slots, np.uint32)
        self.taken_ns: I64 = np.zeros(-(-slots // SLICE), np.int64)
        """By slice."""


class FrameRates:
    """Frames per second of each stream of a service, over the last second or two; measured only while wanted.

    `forget` is called when they are wanted no more.
    """

    def __init__(self, service: ModelService, tasks: Tasks, forget: Callable[[], None]) -> None:
        self._tasks = tasks
        self._forget = forget
        self._table = service.engine.table
        self._samples: list[_Seqs] = []
        """At most the two newest."""
        self._wanted_until_s = 0.0
        self._is_sampling = False

    def want(self) -> None:
        """Measure for a while from now on."""
        self._wanted_until_s = time.monotonic() + _WANTED_S
        if not self._is_sampling:
            self._is_sampling = True
            self._tasks.start(self._sample())

    def of(self, slots: I64) -> F64 | None:
        """Of open streams: float64 [N]; None before they were measured for half a second."""
        if not self._samples or time.monotonic_ns() - self._samples[0].taken_ns[-1] < _LEAST_NS:
            return None
        sample, table = self._samples[0], self._table
        seconds = (time.monotonic_ns() - sample.taken_ns[slots // SLICE]) / 1e9
        is_same = sample.incarnations[slots] == table.incarnations(slots)
        before = np.where(is_same, sample.seqs[slots], table.first_seq[slots])  # another one was opened since
        frames: I64 = np.maximum(table.next_seq[slots] - before, 0)
        return frames / seconds

    async def _sample(self) -> None:
        table = self._table
        try:
            while time.monotonic() < self._wanted_until_s:
                sample = _Seqs(len(table.owner))
                for index, first in enumerate(range(0, len(table.owner), SLICE)):
                    slots = np.arange(first, min(first + SLICE, len(table.owner)))
                    sample.taken_ns[index] = time.monotonic_ns()
                    sample.seqs[slots] = table.next_seq[slots]
                    sample.incarnations[slots] = table.incarnations(slots)
                    await asyncio.sleep(PAUSE_S)
                self._samples = [*self._samples[-1:], sample]
                await asyncio.sleep(_EVERY_S)
        finally:
            self._forget()


def record_of(service: ModelService, rates: FrameRates, name: str) -> dict[str, Any] | None:
    """The record of a stream; None where there is none of that name."""
    stream = service.listing.find(name, time.monotonic_ns())
    if stream is None:
        return None
    rate: float | None = 0.0
    if stream.place is not Place.HIBERNATING:
        measured = rates.of(service.engine.table.find([name]))
        rate = None if measured is None else round(float(measured[0]), 3)
    return {
        "name": name,
        "state": stream.place.name.lower(),
        "owner": stream.owner,
        "seq": stream.next_seq,
        "rate": rate,
        "pending": stream.pending,
        "idle_s": _seconds(stream.idle_ns),
        "expires_in_s": None if stream.expires_in_ns is None else _seconds(stream.expires_in_ns),
        "parked_s": _seconds(stream.silent_ns) if stream.owner is None else None,
    }


def _seconds(time_ns: int) -> float:
    return round(time_ns / 1e9, 3)
