"""Lines of text as they arrive: one frame per line, numbers separated by commas or white space."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np

from instep_client.arguments import why_no_name
from instep_client.protocol.wire import F32, name_is_good
from instep_tools.formats.columns import Choice, Roles, column_names, find_roles, unit_ns
from instep_tools.words import counted

BAD_LINES_NAMED: Final = 5
"""The number of consecutive bad lines that are reported."""


class BadLine(ValueError):
    """A line that is not a frame; the message gives the reason, without the line's number."""


@dataclass(frozen=True, slots=True)
class Line:
    """The frame of a line."""

    stream: str | None
    """The stream's name, if the line names one."""
    time_ns: int | None
    """The frame's time in nanoseconds, if the line has one."""
    frame: F32
    """float32 [features], all finite."""


class LineReader:
    """Reads lines in order; the first line whose columns fit the model may be a header, see `find_roles`.

    Empty lines are skipped, and lines that start with `#`.

    Args:
        choice: the columns of the frame, the stream and the time.
        features: the number of values in a frame.
    """

    def __init__(self, choice: Choice, features: int) -> None:
        self._choice = choice
        self._features = features
        self._names: list[str] = []
        self._roles: Roles | None = None

    def read(self, text: str) -> Line | None:
        """The line's frame, or None if it contains none.

        Raises:
            BadLine: the line is not a frame; the reader can continue with the next one.
            CommandProblem: when the first line does not name a chosen column.
        """
        if not text.strip() or text.startswith("#"):
            return None
        fields = [field.strip() for field in next(csv.reader([text]))] if "," in text else text.split()
        if self._roles is None:
            names, has_names = column_names(fields, self._choice.named)
            roles = find_roles(names, self._choice)
            if len(roles.inputs) != self._features:
                raise BadLine(
                    f"it has {counted(len(roles.inputs), 'number')}, a frame has {self._features}; name its columns "
                    "with --columns, and give --named if the first one names the stream"
                )
            self._names, self._roles = names, roles
            if has_names:
                return None
        if len(fields) != len(self._names):
            raise BadLine(f"it has {counted(len(fields), 'column')}, the first line has {len(self._names)}")
        return self._line(dict(zip(self._names, fields, strict=True)), self._roles)

    def _line(self, fields: dict[str, str], roles: Roles) -> Line:
        stream = None if roles.stream is None else fields[roles.stream]
        if stream is not None and not name_is_good(stream):
            raise BadLine(why_no_name(stream))
        try:
            with np.errstate(over="ignore"):
                frame = np.array([float(fields[name]) for name in roles.inputs]).astype(np.float32)
            time_ns = None if roles.time is None else _time_ns(roles.time, fields[roles.time])
        except (ValueError, OverflowError) as error:
            raise BadLine(str(error)) from None
        if not np.isfinite(frame).all():
            raise BadLine("a number is not finite in float32")
        return Line(stream, time_ns, frame)


def _time_ns(column: str, field: str) -> int:
    """Parse a time to nanoseconds: a number in the unit of the column's name, or an ISO 8601 date and time."""
    try:
        return round(float(field) * unit_ns(column))
    except ValueError:
        moment = datetime.fromisoformat(field)
        return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 10**9)
