"""Samples of the streams that somebody looks at: one of each now and then, while they are looked at."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from instep.core.tables import SCRATCH_SLOT, WINDOW, rows_of
from instep.core.typing import U8
from instep.models.base import StateSpec
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks

_EVERY_S: Final = 0.25
_WATCHED_S: Final = 60.0
"""Time for which a stream is sampled after it was last asked for."""
_MOST_SAMPLES: Final = 240
_MOST_STREAMS: Final = 32
"""Beyond it, those that were asked for least recently are forgotten."""
_MOST_STATE_BYTES: Final = 1024 * 1024
"""Larger states are not read: it would take too long while everything else waits."""
_VALUES: Final = 4
"""Of a frame and of an output."""


class _TracedFrame(NamedTuple):
    time_s: float
    seq: int
    inputs: list[float]
    outputs: list[float]
    state_norm: float | None


@dataclass(slots=True)
class _Trace:
    until_s: float
    samples: deque[_TracedFrame] = field(default_factory=lambda: deque(maxlen=_MOST_SAMPLES))


class Traces:
    """Samples of the streams that were asked for lately.

    `find` gives the service of a name now, or None: a model may be swapped while a stream is looked at.
    """

    def __init__(self, find: Callable[[str], ModelService | None], tasks: Tasks) -> None:
        self._find = find
        self._tasks = tasks
        self._traces: dict[tuple[str, str], _Trace] = {}
        """By model and stream, the one that was asked for least recently first."""
        self._is_sampling = False

    def of(self, model: str, stream: str) -> dict[str, list[Any]]:
        """The samples of a stream so far, as columns; it is sampled for a while from now on."""
        trace = self._traces.pop((model, stream), None) or _Trace(0.0)
        trace.until_s = time.monotonic() + _WATCHED_S
        self._traces[model, stream] = trace
        if len(self._traces) > _MOST_STREAMS:
            del self._traces[next(iter(self._traces))]
        if not self._is_sampling:
            self._is_sampling = True
            self._tasks.start(self._sample_all())
        return {name: [getattr(sample, name) for sample in trace.samples] for name in _TracedFrame._fields}

    async def _sample_all(self) -> None:
        try:
            while self._traces:
                for (model, stream), trace in list(self._traces.items()):
                    if time.monotonic() > trace.until_s:
                        self._traces.pop((model, stream), None)
                    elif (service := self._find(model)) is not None:
                        await _sample(service, stream, trace)
                await asyncio.sleep(_EVERY_S)
        finally:
            self._is_sampling = False


async def _sample(service: ModelService, name: str, trace: _Trace) -> None:
    """Look at the newest frame of a stream, if there is one that was not looked at."""
    table, tables = service.engine.table, service.engine.tables
    slots = table.find([name])
    slot = int(slots[0])
    newest = int(table.step_seq[slot]) - 1
    if slot == SCRATCH_SLOT or newest < table.first_seq[slot] or (trace.samples and trace.samples[-1].seq == newest):
        return
    norm = None
    if service.states.spec.row_bytes <= _MOST_STATE_BYTES:
        seqs, states, lost = await service.states.read(slots)  # between two of its steps
        if lost[0] or table.find([name])[0] != slot:
            return
        newest, norm = int(seqs[0]) - 1, _norm(service.states.spec, states)
    if table.next_seq[slot] - newest > tables.counts[WINDOW]:
        return  # its place in the frame buffer holds the inputs of a frame that waits
    row = int(rows_of(tables, slots, np.array([newest]))[0])
    inputs, outputs = (
        [float(f"{value:.6g}") for value in values[row, :_VALUES].tolist()] for values in (tables.x, tables.y)
    )
    trace.samples.append(_TracedFrame(round(time.time(), 3), newest, inputs, outputs, norm))


def _norm(spec: StateSpec, states: U8) -> float | None:
    """Of all floats of a state, [1, row_bytes]."""
    floats = [leaf for leaf in spec.unpack(states).values() if leaf.dtype.kind == "f"]
    squares = sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in floats)
    return float(f"{math.sqrt(squares):.6g}") if floats else None
