"""Columns by name: those of the frame, the output, the stream and the time."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from instep_tools.formats.table import TableHeader
from instep_tools.problems import CommandProblem

TIME_COLUMNS: Final = ("time", "time_ns", "time_us", "time_ms", "time_s")
"""The first of these columns that a table has is its time, unless another one is named."""
LABELS: Final = ("stream", "stream_id", "seq", *TIME_COLUMNS)
_UNITS_NS: Final = {"_ns": 1, "_us": 10**3, "_ms": 10**6}
_NUMBERED: Final = re.compile(r"x\d+")


@dataclass(frozen=True, slots=True)
class Choice:
    """The columns and streams of a file to send."""

    named: bool = False
    """Whether the first column of text or Parquet names the stream, whatever the column is called."""
    columns: tuple[str, ...] = ()
    """Names or shell patterns of the frame's columns, in this order; empty to recognise them."""
    time: str | None = None
    """The column with the time; None for the first of `TIME_COLUMNS`."""
    streams: str = "*"
    """A shell pattern of the names of streams."""


@dataclass(frozen=True, slots=True)
class Roles:
    """The columns of a table by role; None for a missing one. `stream_id` and `seq` have fixed names."""

    stream: str | None
    time: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def input_columns(features: int) -> tuple[str, ...]:
    """The names of a frame's columns."""
    return tuple(f"x{at}" for at in range(features))


def unit_ns(time: str) -> int:
    """The nanoseconds in a column's unit, from the end of its name (_ns, _us, _ms); seconds by default."""
    return _UNITS_NS.get(time[-3:], 10**9)


def output_columns(source: object, outputs: int) -> tuple[str, ...]:
    """The names of the outputs: y0, y1, …, or those of the model.

    `source` may have the model's names; it is a server's description of itself, or a recording's header.
    """
    names = tuple(map(str, getattr(source, "output_names", None) or ()))
    clash = any(name in LABELS or _NUMBERED.fullmatch(name) for name in names)
    if clash or len(names) != outputs or len(set(names)) != outputs:
        return tuple(f"y{at}" for at in range(outputs))
    return names


def column_names(fields: Sequence[str], named: bool) -> tuple[list[str], bool]:
    """The names of a text's columns, and whether the first line, split into these fields, has them."""
    if fields and not any(map(_is_number, fields[named:])):
        return list(fields), True
    return [*["stream"] * named, *input_columns(len(fields) - named)], False


def find_roles(names: Sequence[str], choice: Choice, header: TableHeader | None = None) -> Roles:
    """Find the roles of columns by name.

    The frame is the chosen columns, the header's inputs, x0, x1, …, or every column without another role. Outputs are
    those of the header, y0, y1, …, or the columns that follow the last x.

    Raises:
        CommandProblem: when a named column is missing, or a name occurs twice.
    """
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise CommandProblem(f"{count} columns are called {name!r}: give each a name of its own")
    known = header or TableHeader()
    stream = next(iter(names), None) if choice.named else "stream" if "stream" in names else None
    time = (
        _fitting(choice.time, names)[0] if choice.time else next((each for each in TIME_COLUMNS if each in names), None)
    )
    rest = [name for name in names if name not in LABELS and name not in (stream, time)]
    x = _numbered("x", rest)
    after = rest[max(map(rest.index, x)) + 1 :] if x else []
    outputs = _all_of(known.outputs, rest) or _numbered("y", rest) or after
    chosen = [name for pattern in choice.columns for name in _fitting(pattern, names)]
    inputs = chosen or _all_of(known.inputs, rest) or x or [each for each in rest if each not in outputs] or outputs
    return Roles(stream, time, tuple(inputs), tuple(name for name in outputs if name not in inputs))


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _numbered(letter: str, names: Sequence[str]) -> list[str]:
    return sorted((name for name in names if re.fullmatch(rf"{letter}\d+", name)), key=lambda name: int(name[1:]))


def _all_of(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    return list(wanted) if set(wanted) <= set(names) else []


def _fitting(pattern: str, names: Sequence[str]) -> list[str]:
    found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1)
        more = f", and {len(names) - 8} more" if len(names) > 8 else ""
        hint = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(names[:8])}{more}"
        raise CommandProblem(f"there is no column {pattern!r}; {hint}")
    return found
