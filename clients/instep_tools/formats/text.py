"""Text: one frame a line, numbers separated by commas, tabs or other white space, with or without a header."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from instep_client.arrays import why_no_name
from instep_client.protocol.wire import F32, name_is_good
from instep_tools.formats.columns import LABELS, Choice, Roles, find_roles, unit_ns
from instep_tools.formats.grouping import sequences_of
from instep_tools.formats.table import TableHeader, TableRows, TableWriter
from instep_tools.problems import BadFile, CommandProblem
from instep_tools.sequences import I64, RecordedSequences
from instep_tools.words import counted

BAD_LINES_NAMED: Final = 5
"""How many bad lines of a file its message names."""
_SEMICOLONS: Final = ": separate numbers by commas or white space, not by semicolons"
_FRACTION: Final = re.compile(r"\.(\d+)")


class BadLine(ValueError):
    """A line that is not a frame; the message says why in a few words, without the line's number.

    Args:
        reason: what is wrong.
        hint: what to do about it, as the end of the sentence; empty where nobody knows.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason + hint)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Line:
    """One frame as a line gave it."""

    stream: str | None
    """The stream's name, where the line names one."""
    stream_id: int
    """Tells apart streams of one name; 0 where the line does not say."""
    seq: int | None
    time_ns: int | None
    """The frame's time in nanoseconds, where the line has one."""
    frame: F32
    """float32 [features], all finite."""
    output: F32
    """float32 [outputs]; empty where the line has none, or they were not asked for."""


@dataclass
class LineReader:
    """Reads the lines of one text in order.

    Empty lines are skipped, and lines that start with `#` unless they have as many columns as the header. A first line
    without any number is a header if its columns fit; see `find_roles` for what they mean.
    """

    choice: Choice
    features: int | None = None
    """Numbers a frame; None to take them from the header or the first good line."""
    with_outputs: bool = False
    """Read them, too."""
    _names: list[str] = field(default_factory=list)
    _separator: str | None = None
    _roles: Roles | None = None
    _at_start: bool = True

    def read(self, text: str) -> Line | None:
        """The line's frame, or None where it holds none.

        Raises:
            BadLine: the line is not a frame; the reader continues with the next one as if it had not been there.
            CommandProblem: when columns were chosen by name and the first line does not name them.
        """
        text = text.strip("\r\n ")
        if not text:
            return None
        fields = self._split(text)
        if text.startswith("#") and len(fields) != len(self._names):
            return None
        if self._at_start:
            self._at_start = False
            if self._is_header(text):
                return None
            if self.choice.columns or self.choice.time:
                raise CommandProblem("--columns and --time name columns, but the first line does not")
        if self._roles is None:
            line = self._plain(fields)
        elif len(fields) != len(self._names):
            hint = f"{_SEMICOLONS}; decimals need a point" if ";" in self._names[0] else ""
            raise BadLine(f"it has {counted(len(fields), 'column')}, the header has {len(self._names)}", hint)
        else:
            line = self._by_roles(fields, self._roles)
        if line.stream is not None and not name_is_good(line.stream):
            raise BadLine(why_no_name(line.stream))
        self.features = len(line.frame)
        return line

    def _split(self, text: str) -> list[str]:
        separator = next((each for each in (self._separator, ",") if each and each in text), None)
        if separator is None:
            return text.split()
        return _fields(text, separator)

    def _is_header(self, text: str) -> bool:
        separator = next((each for each in (",", "\t") if each in text), None)
        names = text.split() if separator is None else _fields(text, separator)
        if any(_is_number(name) for name in names[self.choice.named :]):
            return False
        roles = find_roles(names, self.choice)
        fits = len(roles.inputs) == self.features if self.features is not None else bool(roles.inputs)
        if self.choice.columns and not fits:
            raise CommandProblem(
                f"--columns names {counted(len(roles.inputs), 'column')}, a frame of the model has {self.features}"
            )
        if fits or any(name in ("x0", *LABELS) for name in names):
            self._names, self._separator, self._roles = names, separator, roles
        return self._roles is not None

    def _plain(self, fields: list[str]) -> Line:
        """Numbers only, or a name and numbers."""
        named = self.choice.named
        numbers = fields[1:] if named else fields
        self._check_count(numbers, fields)
        if self.features is None and not named and len(fields) > 1 and not _is_number(fields[0]):
            raise BadLine(f"{fields[0]!r:.40} is not a number", _named_hint(fields[0]))
        return Line(fields[0] if named else None, 0, None, None, _frame(numbers), np.empty(0, np.float32))

    def _by_roles(self, fields: list[str], roles: Roles) -> Line:
        numbers = [fields[at] for at in roles.inputs]
        self._check_count(numbers, fields)
        outputs = [_number(fields[at], finite=False) for at in roles.outputs] if self.with_outputs else []
        with np.errstate(over="ignore"):  # an output may be anything
            output = np.array(outputs).astype(np.float32)
        return Line(
            stream=None if roles.stream is None else fields[roles.stream],
            stream_id=0 if roles.stream_id is None else _integer(fields[roles.stream_id]),
            seq=None if roles.seq is None else _integer(fields[roles.seq]),
            time_ns=None if roles.time is None else time_ns(self._names[roles.time], fields[roles.time]),
            frame=self._frame_by_roles(numbers, roles),
            output=output,
        )

    def _frame_by_roles(self, numbers: list[str], roles: Roles) -> F32:
        try:
            return _frame(numbers)
        except BadLine as error:
            fields = zip(roles.inputs, numbers, strict=True)
            texts = [self._names[at] for at, field in fields if field and not _is_number(field)]
            hint = ""
            if texts and ";" in texts[0]:
                hint = _SEMICOLONS
            elif texts and self.features is None and not self.choice.columns:  # no line was good by now
                hint = "; name the frame's columns with --columns"
                if texts == self._names[:1] and roles.stream is None:
                    hint += f", and give --named if {texts[0]!r:.40} names the stream"
            raise BadLine(error.reason, hint) from None

    def _check_count(self, numbers: list[str], fields: list[str]) -> None:
        if not numbers:
            raise BadLine("it holds no numbers")
        if self.features is None or len(numbers) == self.features:
            return
        hint = ""
        if any(";" in field for field in fields):
            hint = _SEMICOLONS
        elif self._roles is not None:
            hint = f": the columns are {', '.join(self._names)}; name those of the frame with --columns"
        elif not self.choice.named and len(numbers) - 1 == self.features and not _is_number(fields[0]):
            hint = _named_hint(fields[0])
        raise BadLine(f"it has {counted(len(numbers), 'number')}, a frame has {self.features}", hint)


def time_ns(column: str, field: str) -> int:
    """A moment in nanoseconds: an ISO 8601 date and time, or a number in the unit that ends the column's name.

    Without such an ending it is in seconds.

    Raises:
        BadLine: when it is neither.
    """
    unit = unit_ns(column)
    if unit == 1:
        return _integer(field)
    if _is_number(field):
        return _int64(round(_number(field) * unit), field)
    fraction = _FRACTION.search(field)
    try:
        moment = datetime.fromisoformat(_FRACTION.sub("", field))
    except ValueError:
        raise BadLine(f"{field!r:.40} is not a time: seconds, or like 2026-01-31T12:00:00.5Z") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    digits = "" if fraction is None else fraction[1][:9]
    return _int64(int(moment.timestamp()) * 10**9 + int(digits.ljust(9, "0")), field)


def read_text(path: Path, choice: Choice) -> RecordedSequences:
    """A file of lines; without a column that names streams it is one stream, called as the file.

    Raises:
        BadFile: naming the lines that are not frames.
    """
    reader = LineReader(choice, with_outputs=True)
    lines: list[Line] = []
    bad: list[str] = []
    hint = ""
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            try:
                line = reader.read(text)
            except BadLine as error:
                bad.append(f"line {number}: {error.reason}")
                hint = hint or error.hint
            else:
                lines += () if line is None else (line,)
    if bad:
        more = f"; and {len(bad) - BAD_LINES_NAMED} more" if len(bad) > BAD_LINES_NAMED else ""
        raise BadFile(f"{path}: {'; '.join(bad[:BAD_LINES_NAMED])}{more}{hint}")
    if not lines:
        raise BadFile(f"{path} holds no frames")
    return sequences_of(
        path,
        [path.stem if line.stream is None else line.stream for line in lines],
        [line.stream_id for line in lines],
        _column([line.seq for line in lines]),
        _column([line.time_ns for line in lines]),
        np.stack([line.frame for line in lines]),
        np.stack([line.output for line in lines]),
        TableHeader(),
    )


def _column(values: Sequence[int | None]) -> I64 | None:
    """All lines of a text have such a value or none has."""
    return None if values[0] is None else np.array(values, np.int64)


class TextWriter(TableWriter):
    """CSV, or with tabs TSV: a line of column names, then one line a frame; UTF-8.

    Each float is written with the fewest digits that read back as the same float32.
    """

    def __init__(self, file: BinaryIO, header: TableHeader) -> None:
        self._file = file
        self._timed = header.timed
        self._write([["stream", "stream_id", "seq", *["time_ns"] * header.timed, *header.inputs, *header.outputs]])

    def add(self, rows: TableRows) -> None:
        """Write them."""
        labels = [rows.names.tolist(), rows.stream_ids.tolist(), rows.seqs.tolist()]
        if self._timed and rows.times_ns is not None:
            labels.append(rows.times_ns.tolist())
        values = zip(*labels, float_texts(rows.x), float_texts(rows.y), strict=True)
        self._write([[*label, *x, *y] for *label, x, y in values])

    def close(self) -> None:
        """Nothing is left to do."""

    def _write(self, lines: list[list[object]]) -> None:
        self._file.write(csv_lines(lines).encode())


def csv_lines(lines: Sequence[Sequence[object]], separator: str = ",") -> str:
    """The lines with their ends; text with separators is quoted."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(lines)
    return text.getvalue()


def float_texts(values: F32) -> list[list[str]]:
    """Every float32 [N, M] in the fewest digits that give it back."""
    return [[str(value) for value in row] for row in values]


def _fields(text: str, separator: str) -> list[str]:
    """The columns of a line, which may be quoted."""
    try:
        fields = next(csv.reader([text], delimiter=separator)) if '"' in text else text.split(separator)
    except csv.Error as error:
        raise BadLine(f"it cannot be split into columns: {error}") from None
    return [field.strip() for field in fields]


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _named_hint(field: str) -> str:
    return f": if {field!r:.40} names the stream, give --named"


def _number(field: str, finite: bool = True) -> float:
    try:
        number = float(field)
    except ValueError:
        raise BadLine(f"{field!r:.40} is not a number" if field else "a field is empty") from None
    if finite and not math.isfinite(number):
        raise BadLine(f"{field:.40} is not a finite number")
    return number


def _integer(field: str) -> int:
    try:
        number = int(field)
    except ValueError:
        raise BadLine(f"{field!r:.40} is not a whole number" if field else "a field is empty") from None
    return _int64(number, field)


def _int64(number: int, field: str) -> int:
    if not -(2**63) <= number < 2**63:
        raise BadLine(f"{field:.40} is too large")
    return number


def _frame(fields: list[str]) -> F32:
    frame = np.array([_number(field) for field in fields])
    if np.abs(frame).max() > np.finfo(np.float32).max:
        raise BadLine("a number is too large for float32")
    return frame.astype(np.float32)
