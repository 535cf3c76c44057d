"""Clocks that do what a test says, terminals that remember, and a server whose speed is a formula."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from instep_client.protocol.wire import F32, ServerInfo
from instep_tools.sequences import RecordedSequences
from instep_tools.terminal import Terminal
from tests.support.fake_server import INFO


class JumpingClock:
    """Time passes only while somebody sleeps, and by `tick_s` whenever somebody asks."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.time = 1000.0
        self.tick_s = tick_s
        self.slept: list[float] = []
        self.on_sleep: Callable[[float], None] = lambda moment: None

    def now(self) -> float:
        self.time += self.tick_s
        return self.time

    async def sleep_until(self, moment: float) -> None:
        self.on_sleep(moment)
        self.slept.append(moment)
        self.time = max(self.time, moment)
        await asyncio.sleep(0)


class RememberingTerminal(Terminal):
    """What was said, as text."""

    def __init__(self, as_json: bool = False) -> None:
        super().__init__(as_json)
        self.out = Console(file=StringIO(), width=200, highlight=False, soft_wrap=True)
        self.err = Console(file=StringIO(), width=200, highlight=False, soft_wrap=True)
        self.data = ""
        self.readers = True

    def write(self, text: str) -> bool:
        if self.readers:
            self.data += text
        return self.readers

    @property
    def said(self) -> str:
        return cast(StringIO, self.out.file).getvalue()

    @property
    def complained(self) -> str:
        return cast(StringIO, self.err.file).getvalue()

    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.data)
        return values


@dataclass(frozen=True)
class ModelAnswer:
    queue_us: int
    compute_us: int
    send_us: int


class ModelGroup:
    """Answers after a time on the test's clock; `behave` gives it for the number of the block, or raises."""

    def __init__(self, clock: JumpingClock, names: Sequence[str], behave: Callable[[int], float]) -> None:
        self.names = tuple(names)
        self.shapes: list[tuple[int, ...]] = []
        self.sent_at: list[float] = []
        self._clock = clock
        self._behave = behave

    async def step_timed(self, x: F32, /) -> ModelAnswer:
        number = len(self.shapes)
        self.shapes.append(x.shape)
        self.sent_at.append(self._clock.time)
        seconds = self._behave(number)
        if np.isinf(seconds):
            await asyncio.Event().wait()
        self._clock.time += seconds
        return ModelAnswer(queue_us=10, compute_us=20, send_us=30)


class ModelServer:
    """Connections whose groups behave as the test says."""

    def __init__(
        self, clock: JumpingClock, behave: Callable[[int], float] = lambda number: 0.0, info: ServerInfo = INFO
    ) -> None:
        self.info = info
        self.groups: list[ModelGroup] = []
        self.open_connections = 0
        self.connections = 0
        self._clock = clock
        self._behave = behave
        self.is_connected = True

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[ModelServer]:
        self.connections += 1
        self.open_connections += 1
        try:
            yield self
        finally:
            self.open_connections -= 1

    async def open_group(self, names: Sequence[str], /) -> ModelGroup:
        group = ModelGroup(self._clock, names, self._behave)
        self.groups.append(group)
        return group


def save_table(path: Path, sequences: RecordedSequences) -> None:
    """The sequences in the documented layout of an NPZ, written by numpy alone; states are one float32 array each."""
    lengths = sequences.lengths
    metadata = {"fingerprint": sequences.fingerprint}
    metadata |= {} if sequences.model is None else {"model": sequences.model}
    if sequences.initial_states:
        shape = next(iter(sequences.initial_states.values()))["h"].shape
        rows = [[row, 0, b64encode(state["h"].tobytes()).decode()] for row, state in sequences.initial_states.items()]
        metadata |= {"state": json.dumps([["h", shape, "float32", 0.0]]), "states": json.dumps(rows)}
    arrays: dict[str, Any] = {
        "stream": np.repeat(sequences.names, lengths),
        "stream_id": np.repeat(np.arange(len(sequences)), lengths),
        "seq": np.concatenate([np.arange(length) for length in lengths]),
        "x": sequences.frames,
        "metadata": np.array(json.dumps(metadata).encode()),
    }
    if sequences.outputs is not None:
        arrays["y"] = sequences.outputs
    if sequences.times_ns is not None:
        arrays["time_ns"] = sequences.times_ns
    np.savez(path, **arrays)


def info_with(**changes: Any) -> ServerInfo:
    return replace(INFO, **changes)
