"""A table of frames and outputs: its rows and its metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import F32
from instep_tools.sequences import I64

CHUNK_FRAMES: Final = 65_536
"""The most rows that are collected before they are written."""


@dataclass(frozen=True, slots=True)
class StartState:
    """The state before frame `seq` of a stream, if it does not result from the frames before it."""

    stream_id: int
    seq: int
    row: bytes | None
    """A row in the layout of the `StateSpec`; None for the model's initial state."""


@dataclass(frozen=True)
class TableHeader:
    """The metadata of a table."""

    inputs: tuple[str, ...] = ()
    """The names of the frame's columns."""
    outputs: tuple[str, ...] = ()
    """The names of the output's columns."""
    timed: bool = True
    """Whether rows have a time."""
    about: Mapping[str, str] = field(default_factory=dict)
    """The model's name and fingerprint, the arithmetic, and the version of instep."""
    spec: StateSpec | None = None
    """The layout of the states."""
    states: Sequence[StartState] = ()

    @property
    def metadata(self) -> dict[str, str]:
        """The header as text, for files that can store metadata."""
        values = {**self.about, "inputs": json.dumps(self.inputs), "outputs": json.dumps(self.outputs)}
        if self.states and self.spec is not None:
            rows = [
                (state.stream_id, state.seq, None if state.row is None else base64.b64encode(state.row).decode())
                for state in self.states
            ]
            values |= {"state": json.dumps(self.spec.encode()), "states": json.dumps(rows)}
        return values

    @classmethod
    def from_metadata(cls, values: Mapping[str, str]) -> TableHeader:
        """Parse the result of `metadata`; a file without metadata gives an empty header.

        Raises:
            Exception: of any kind, when it is damaged.
        """
        own = dict(values)
        inputs, outputs = (tuple(map(str, json.loads(own.pop(part, "[]")))) for part in ("inputs", "outputs"))
        states = [
            StartState(int(stream), int(seq), None if row is None else base64.b64decode(row, validate=True))
            for stream, seq, row in json.loads(own.pop("states", "[]"))
        ]
        spec = StateSpec.decode(json.loads(own.pop("state"))) if "state" in own else None
        return cls(inputs, outputs, about=own, spec=spec, states=states)


def about_model(model: str, fingerprint: str, arithmetic: str, instep: str | None = None) -> dict[str, str]:
    """The entries of `TableHeader.about`; the version of instep is the installed one unless it is given."""
    values = {"model": model, "fingerprint": fingerprint, "arithmetic": arithmetic}
    return {**values, "version": version("instep") if instep is None else instep}


@dataclass(frozen=True, slots=True)
class TableRows:
    """Some rows of a table, as columns of one length."""

    names: npt.NDArray[np.object_]
    """Stream names."""
    stream_ids: I64
    seqs: npt.NDArray[np.uint64]
    times_ns: I64 | None
    """Nanoseconds since 1970."""
    x: F32
    """float32 [rows, features]."""
    y: F32
    """float32 [rows, outputs]; all NaN if the output is unknown."""

    def __len__(self) -> int:
        return len(self.seqs)

    @classmethod
    def join(cls, parts: Sequence[TableRows]) -> TableRows:
        """Concatenate one or more parts."""
        columns: list[list[Any]] = [[getattr(part, each.name) for part in parts] for each in fields(cls)]
        joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
        return cls(*joined)


_NOT_FINITE: Final = {"nan": "null", "inf": "1e999", "-inf": "-1e999"}
"""Infinities as JSON can represent them: numbers too large for a float, which are read back as infinite."""


def json_numbers(values: F32) -> str:
    """A JSON list with the fewest digits that reproduce every float32; NaN is null."""
    return f"[{', '.join(_NOT_FINITE.get(text, text) for text in map(str, values))}]"
