"""Columns by name: which of them are the frame, the output, the stream and the time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep_tools.formats.table import TableHeader
from instep_tools.problems import CommandProblem
from instep_tools.sequences import RecordedSequences

TIME_COLUMNS: Final = ("time", "time_ns", "time_us", "time_ms", "time_s")
"""The first of them that a table has is its time, unless another column is named."""
LABELS: Final = ("stream", "stream_id", "seq", *TIME_COLUMNS)
_UNITS_NS: Final = {"_ns": 1, "_us": 10**3, "_ms": 10**6}
_NUMBERED: Final = re.compile(r"x\d+")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which columns and streams of a file are meant."""

    named: bool = False
    """The first column of text or Parquet names the stream, whatever the column is called."""
    columns: tuple[str, ...] = ()
    """The columns that are the frame, in this order; empty for those that look like it."""
    time: str | None = None
    """The column with the time; None for the first of `TIME_COLUMNS`."""
    only: str = "*"
    """A pattern of stream names, as in a shell."""


def input_columns(features: int) -> tuple[str, ...]:
    """What the numbers of a frame are called."""
    return tuple(f"x{at}" for at in range(features))


def unit_ns(time: str) -> int:
    """Nanoseconds in the unit of a column of numbers: as its name ends (_ns, _us, _ms), or else seconds."""
    return _UNITS_NS.get(time[-3:], 10**9)


def output_columns(source: object, outputs: int) -> tuple[str, ...]:
    """What the outputs are called: y0, y1, …, or as the model says.

    `source` may know the model's names: a server's description of itself, or a recording's header.
    """
    names = tuple(map(str, getattr(source, "output_names", None) or ()))
    clash = any(name in LABELS or _NUMBERED.fullmatch(name) for name in names)
    if clash or len(names) != outputs or len(set(names)) != outputs:
        return tuple(f"y{at}" for at in range(outputs))
    return names


@dataclass(frozen=True, slots=True)
class Roles:
    """Which columns of a table are what, as places among its columns; None where there is none."""

    stream: int | None
    stream_id: int | None
    seq: int | None
    time: int | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def find_roles(names: Sequence[str], choice: Choice, header: TableHeader | None = None) -> Roles:
    """Tell what the columns of these names are.

    The frame is what was chosen, or what the header says, or x0, x1, …, or else every column that is nothing else.
    Outputs are those of the header, or y0, y1, …, or else what follows the columns x0, x1, ….

    Raises:
        CommandProblem: when a column that was named is not there.
    """
    names = ["stream", *names[1:]] if choice.named else names
    at = {name: place for place, name in reversed(list(enumerate(names)))}
    time = choice.time or next((name for name in TIME_COLUMNS if name in at), None)
    for name in (*choice.columns, *filter(None, [choice.time])):
        if name not in at:
            raise CommandProblem(no_such_column(name, names))
    rest = [place for place, name in enumerate(names) if name not in LABELS and name != time]
    known = header or TableHeader()
    numbered = _numbered("x", at)
    outputs = _places(known.outputs, at) or _numbered("y", at)
    if not outputs and numbered:
        outputs = [place for place in rest if place > max(numbered)]
    inputs = _places(choice.columns, at) or _places(known.inputs, at) or numbered
    inputs = inputs or [place for place in rest if place not in outputs] or outputs
    return Roles(
        stream=at.get("stream"),
        stream_id=at.get("stream_id"),
        seq=at.get("seq"),
        time=None if time is None else at[time],
        inputs=tuple(inputs),
        outputs=tuple(place for place in outputs if place not in inputs),
    )


def _numbered(letter: str, at: Mapping[str, int]) -> list[int]:
    """Where x0, x1, … are, as far as they are there."""
    count = 0
    while f"{letter}{count}" in at:
        count += 1
    return [at[f"{letter}{number}"] for number in range(count)]


def _places(names: Sequence[str], at: Mapping[str, int]) -> list[int]:
    """Where all of them are; empty when one is missing."""
    return [at[name] for name in names] if all(name in at for name in names) else []


def no_such_column(name: str, names: Sequence[str]) -> str:
    """The sentence for a column that was named and is not there."""
    near = difflib.get_close_matches(name, names, n=1)
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    hint = f"did you mean {near[0]!r}?" if near else f"its columns are {', '.join(names[:8])}{more}"
    return f"there is no column {name!r}; {hint}"


def chosen_columns(
    sequences: RecordedSequences, choice: Choice, header: TableHeader | None = None
) -> RecordedSequences:
    """The sequences of a file that holds frames and outputs as arrays, with the chosen columns as the frame.

    Raises:
        CommandProblem: when there is no such column.
    """
    if not choice.columns:
        return sequences
    known = header or TableHeader()
    outputs = sequences.outputs
    names = list(known.inputs or input_columns(sequences.features))
    names += () if outputs is None else known.outputs or output_columns(None, outputs.shape[1])
    numbers: npt.NDArray[Any] = sequences.frames if outputs is None else np.hstack([sequences.frames, outputs])
    roles = find_roles(names, Choice(columns=choice.columns), known)
    frames = np.ascontiguousarray(numbers[:, roles.inputs])
    return replace(sequences, frames=frames, outputs=None if outputs is None else numbers[:, roles.outputs])
