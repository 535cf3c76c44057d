"""Lines as they arrive."""

from __future__ import annotations

import numpy as np
import pytest

from instep_tools.formats.columns import Choice
from instep_tools.formats.lines import BadLine, Line, LineReader


def read(reader: LineReader, text: str) -> Line:
    line = reader.read(text)
    assert line is not None
    assert line.frame.dtype == np.float32
    return line


@pytest.mark.parametrize("text", ["1 2.5 -3e2", "1,2.5,-3e2", " 1 ,\t2.5 , -3e2 \r", "1\t2.5   -300\n"])
def test_numbers_are_separated_by_commas_or_white_space(text: str) -> None:
    assert read(LineReader(Choice(), 3), text).frame.tolist() == [1.0, 2.5, -300.0]


@pytest.mark.parametrize("text", ["1 2", "1 two 3", "1,,3", "1 nan 3", "1 1e39 3"])
@pytest.mark.parametrize("first", [True, False])
def test_bad_lines_leave_the_next_one_alone(text: str, first: bool) -> None:
    reader = LineReader(Choice(), 3)
    if not first:
        read(reader, "0 0 0")
    with pytest.raises(BadLine):
        reader.read(text)
    assert read(reader, "7 8 9").frame.tolist() == [7, 8, 9]


def test_the_first_column_names_the_stream_and_other_lines_hold_nothing() -> None:
    reader = LineReader(Choice(named=True), 2)
    for text in ("", "  \n", "# a comment, 1, 2", "who a b"):
        assert reader.read(text) is None
    for text, name in (("mic-1 1 2", "mic-1"), ("12, 1, 2", "12")):
        line = read(reader, text)
        assert (line.stream, line.time_ns, line.frame.tolist()) == (name, None, [1, 2])
    for text in ("a" * 201 + " 1 2", "a\x7fb 1 2"):
        with pytest.raises(BadLine, match="stream name"):
            reader.read(text)


def test_a_header_that_fits_names_the_columns() -> None:
    reader = LineReader(Choice(), 2)
    with pytest.raises(BadLine):
        reader.read("hello")
    assert reader.read('stream,"x,1",x0,time_s,x1') is None
    line = read(reader, '"a ""b""",9,1,0.25,2')
    assert (line.stream, line.frame.tolist(), line.time_ns) == ('a "b"', [1, 2], 250_000_000)
    for text in ("1,2", "a,9,1,soon,2", "stream,x,x0,time_s,x1"):
        with pytest.raises(BadLine):
            reader.read(text)


@pytest.mark.parametrize(
    ("column", "text", "ns"),
    [
        ("time_ns", "17000000", 17_000_000),
        ("time", "1970-01-01T00:00:01.5Z", 1_500_000_000),
    ],
)
def test_times(column: str, text: str, ns: int) -> None:
    reader = LineReader(Choice(time=column), 1)
    assert reader.read(f"{column},x0") is None
    assert read(reader, f"{text},1").time_ns == ns
