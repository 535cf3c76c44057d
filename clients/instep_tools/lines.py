"""Frames as lines of text: numbers separated by commas or white space, one frame a line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from instep_client.protocol.wire import F32, MAX_NAME_BYTES, name_is_good
from instep_tools.words import counted

STREAM_COLUMN = "stream"
TIME_COLUMN = "time_s"
SEQ_COLUMN = "seq"
_NOT_OF_THE_FRAME = (STREAM_COLUMN, TIME_COLUMN, SEQ_COLUMN)


class BadLine(ValueError):
    """A line that is not a frame; the message says why in a few words, without the line's number."""


@dataclass(frozen=True, slots=True)
class Line:
    """One frame as a line gave it."""

    stream: str | None
    """The stream's name, where the line names one."""
    time_s: float | None
    """The frame's time in seconds, where the line has one."""
    frame: F32
    """float32 [features], all finite."""


class LineReader:
    """Reads the lines of one text in order.

    Empty lines and lines that start with `#` are skipped. A first line that holds no number, and as many columns as a
    frame, is a header: its column `stream` names the stream, `time_s` is the frame's time in seconds, `seq` is ignored,
    and all others are the frame.

    Args:
        features: how many numbers a frame has; None to take it from the first good line.
        named: whether the first column names the stream; a header is skipped then.
    """

    def __init__(self, features: int | None = None, named: bool = False) -> None:
        self.features = features
        self.named = named
        self._header: list[str] | None = None
        self._at_start = True

    def read(self, text: str) -> Line | None:
        """The line's frame, or None where it holds none.

        Raises:
            BadLine: the line is not a frame; the reader goes on with the next one as if it had not been there.
        """
        text = text.strip()
        if not text or text.startswith("#"):
            return None
        fields = [field.strip() for field in text.split(",")] if "," in text else text.split()
        if self._at_start:
            self._at_start = False
            if self._is_header(fields):
                self._header = None if self.named else fields
                return None
        stream, time_s, numbers = self._columns(fields)
        if stream is not None and not name_is_good(stream):
            raise BadLine(f"{stream!r:.40} is no stream name: 1 to {MAX_NAME_BYTES} bytes of printable text")
        if self.features is not None and len(numbers) != self.features:
            hint = self._hint(text, numbers)
            raise BadLine(f"it has {counted(len(numbers), 'number')}, a frame has {self.features}{hint}")
        if not numbers:
            raise BadLine("it holds no numbers")
        frame = _frame(numbers)
        self.features = len(numbers)
        return Line(stream, time_s, frame)

    def _hint(self, text: str, fields: list[str]) -> str:
        """What to do about a line of so many fields, where that can be guessed."""
        if ";" in text:
            return ": separate numbers by commas or white space, not by semicolons"
        if not self.named and self._header is None and len(fields) - 1 == self.features and not _is_number(fields[0]):
            return f": if {fields[0]!r:.40} names the stream, give --named"
        return ""

    def _is_header(self, fields: list[str]) -> bool:
        columns = fields[1:] if self.named else [name for name in fields if name not in _NOT_OF_THE_FRAME]
        fits = len(columns) == self.features if self.features is not None else bool(columns)
        return fits and not any(_is_number(field) for field in fields[self.named :])

    def _columns(self, fields: list[str]) -> tuple[str | None, float | None, list[str]]:
        if self._header is None:
            return (fields[0], None, fields[1:]) if self.named else (None, None, fields)
        if len(fields) != len(self._header):
            raise BadLine(f"it has {counted(len(fields), 'column')}, the header has {len(self._header)}")
        stream: str | None = None
        time_s: float | None = None
        numbers: list[str] = []
        for column, field in zip(self._header, fields, strict=True):
            if column == STREAM_COLUMN:
                stream = field
            elif column == TIME_COLUMN:
                time_s = _number(field)
            elif column != SEQ_COLUMN:
                numbers.append(field)
        return stream, time_s, numbers


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _number(field: str) -> float:
    try:
        number = float(field)
    except ValueError:
        raise BadLine(f"{field!r:.40} is not a number" if field else "a field is empty") from None
    if not math.isfinite(number):
        raise BadLine(f"{field:.40} is not a finite number")
    return number


def _frame(fields: list[str]) -> F32:
    frame = np.array([_number(field) for field in fields])
    if np.abs(frame).max() > np.finfo(np.float32).max:
        raise BadLine("a number is too large for float32")
    return frame.astype(np.float32)
