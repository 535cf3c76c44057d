"""Frames and outputs as one table: what is known about it beside its rows, and rows to be written."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import F32
from instep_tools.problems import CommandProblem
from instep_tools.sequences import I64

CHUNK_FRAMES: Final = 65_536
"""The most rows that are collected before they are written."""


@dataclass(frozen=True, slots=True)
class StartState:
    """The state before frame `seq` of a stream, where it is not what the frames before it left."""

    stream_id: int
    seq: int
    row: bytes | None
    """Laid out as the `StateSpec` says; None for the model's initial state."""


@dataclass(frozen=True)
class TableHeader:
    """What is known about a table beside its rows."""

    inputs: tuple[str, ...] = ()
    """Names of the frame's columns."""
    outputs: tuple[str, ...] = ()
    """Names of the output's columns."""
    timed: bool = True
    """Whether rows have a time."""
    about: Mapping[str, str] = field(default_factory=dict)
    """The model's name, its fingerprint, the arithmetic, and the version of instep."""
    spec: StateSpec | None = None
    """The layout of the states."""
    states: Sequence[StartState] = ()

    @property
    def metadata(self) -> dict[str, str]:
        """All of it as text, for files that have a place for that."""
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
        """What `metadata` gave; empty where a file has none.

        Raises:
            ValueError: when it is damaged.
        """
        known = ("inputs", "outputs", "state", "states")
        try:
            about = {name: text for name, text in values.items() if name not in known}
            inputs, outputs = (tuple(map(str, json.loads(values.get(part, "[]")))) for part in ("inputs", "outputs"))
            spec = StateSpec.decode(json.loads(values["state"])) if "state" in values else None
            states = [
                StartState(int(stream), int(seq), None if row is None else base64.b64decode(row, validate=True))
                for stream, seq, row in json.loads(values.get("states", "[]"))
            ]
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"its metadata is damaged: {error}") from None
        return cls(inputs, outputs, True, about, spec, states)


def about_model(model: str, fingerprint: str, arithmetic: str, instep: str | None = None) -> dict[str, str]:
    """The entries of `TableHeader.about`; the version of instep is this one's where it is not given."""
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
    """float32 [rows, outputs]; all NaN where the output is not known."""

    def __len__(self) -> int:
        return len(self.seqs)


class TableWriter(ABC):
    """Writes a table of one format into an open binary file, which stays open. Leaving a `with` block closes it.

    Raises:
        CommandProblem: when a library is missing, or the format cannot hold the table.
        OSError: when it cannot be written.
    """

    @abstractmethod
    def add(self, rows: TableRows) -> None:
        """Write these rows after those before."""

    @abstractmethod
    def close(self) -> None:
        """Write the file's end."""

    def discard(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what is held: the file will not be used."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


@contextmanager
def optional_libraries(format: str) -> Iterator[None]:
    """Import inside what only this format needs.

    Raises:
        CommandProblem: when it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise CommandProblem(
            f"{format} needs the library {error.name or error}, which is not installed: "
            'pip install "instep[export]", or pip install -e ".[export]" in a checkout; or use csv or npz'
        ) from error
