from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.formats.text import BadLine, Line, LineReader
from instep_tools.problems import BadFile, CommandProblem

NAMED = Choice(named=True)
SEMICOLONS = ": separate numbers by commas or white space, not by semicolons"


def read(reader: LineReader, text: str) -> Line:
    line = reader.read(text)
    assert line is not None
    assert line.frame.dtype == np.float32
    return line


@pytest.mark.parametrize("text", ["1 2.5 -3e2", "1,2.5,-3e2", " 1 ,\t2.5 , -3e2 \r", "1\t2.5   -300\n"])
def test_numbers_are_separated_by_commas_or_white_space(text: str) -> None:
    assert read(LineReader(Choice(), 3), text).frame.tolist() == [1.0, 2.5, -300.0]


def test_every_float32_survives_in_its_shortest_digits(rng: np.random.Generator) -> None:
    values = rng.integers(0, 0x7F800000, 1000, np.uint32).view(np.float32)
    line = read(LineReader(Choice()), " ".join(str(value) for value in values))
    np.testing.assert_array_equal(line.frame, values)


@pytest.mark.parametrize("text", ["", "  \n", "# a comment, 1, 2"])
def test_empty_lines_and_comments_hold_nothing(text: str) -> None:
    assert LineReader(Choice(), 2).read(text) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 2", "it has 2 numbers, a frame has 3"),
        ("1 2 3 4", "it has 4 numbers, a frame has 3"),
        ("1 two 3", "'two' is not a number"),
        ("1,,3", "a field is empty"),
        ("1 nan 3", "nan is not a finite number"),
        ("1 -inf 3", "-inf is not a finite number"),
        ("1 1e39 3", "too large for float32"),
        ("1 1e400 3", "1e400 is not a finite number"),
        ("x" * 100 + " 2 3", "'x"),
    ],
)
def test_bad_lines_say_why_and_leave_the_next_one_alone(text: str, why: str) -> None:
    reader = LineReader(Choice())
    assert read(reader, "0 0 0").frame.tolist() == [0, 0, 0]
    with pytest.raises(BadLine) as failure:
        reader.read(text)
    assert why in str(failure.value)
    assert len(str(failure.value)) < 80
    assert read(reader, "7 8 9").frame.tolist() == [7, 8, 9]


def test_the_first_column_names_the_stream() -> None:
    reader = LineReader(NAMED, 2)
    assert reader.read("who x x") is None
    for text, name in (("mic-1 1 2", "mic-1"), ("12, 1, 2", "12")):
        line = read(reader, text)
        assert (line.stream, line.time_ns, line.frame.tolist()) == (name, None, [1, 2])
    for text in ("a" * 201 + " 1 2", "a\x7fb 1 2"):
        with pytest.raises(BadLine, match="is not a valid stream name: it "):
            reader.read(text)
    with pytest.raises(BadLine, match="it holds no numbers"):
        LineReader(NAMED, 2).read("1")


def test_only_the_first_line_can_be_a_header_and_only_one_that_fits() -> None:
    reader = LineReader(Choice(), 2)
    assert reader.read("# made by hand") is None
    assert reader.read("x y") is None
    with pytest.raises(BadLine):
        reader.read("x y")
    reader = LineReader(Choice(), 2)
    with pytest.raises(BadLine, match="it has 1 number, a frame has 2"):
        reader.read("hello")
    assert read(reader, "1 2").frame.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("header", "choice", "frame", "output"),
    [
        ("seq,stream,left,time_s,right", Choice(), [2, 4], []),
        ("seq,stream,x0,time_s,x1", Choice(), [2, 4], []),
        ("stream,x1,x0,time_s,y0", Choice(), [2, 1], [4]),
        ("stream,x0,time_s,speech,noise", Choice(), [1], [3, 4]),
        ("stream,a,b,time_s,y0", Choice(), [1, 2], [4]),
        ("stream,a,b,time_s,y0", Choice(columns=("b",)), [2], [4]),
        ("stream,x0,y0,time_s,y1", Choice(columns=("y1", "y0")), [4, 2], []),
        ("stream,y0,y1,time_s,y2", Choice(), [1, 2, 4], []),
        ("stream,a,b,c,at", Choice(time="at"), [1, 2, 3], []),
        ("who,a,b,time_s,c", Choice(named=True), [1, 2, 4], []),
    ],
)
def test_what_the_columns_of_a_header_are(
    header: str, choice: Choice, frame: Sequence[int], output: Sequence[int]
) -> None:
    """Every field is the number of its place, from 0."""
    for separator in (",", "\t"):
        reader = LineReader(choice, with_outputs=True)
        assert reader.read(header.replace(",", separator)) is None
        fields = ["0", "1", "2", "3", "4"]
        line = read(reader, separator.join(fields))
        assert (line.frame.tolist(), line.output.tolist()) == (frame, output)
        names = header.split(",")
        time = choice.time or ("time_s" if "time_s" in names else None)
        assert line.time_ns == (None if time is None else names.index(time) * 10**9)
        named = choice.named or "stream" in names
        assert line.stream == (str(0 if choice.named else names.index("stream")) if named else None)


def test_lines_that_do_not_fit_the_header() -> None:
    reader = LineReader(Choice())
    assert reader.read('stream,"x,1",time_s') is None
    line = read(reader, '"a ""b"", c",1,0.25')
    assert (line.stream, line.frame.tolist()) == ('a "b", c', [1])
    assert read(reader, "#1,2,0").stream == "#1"  # not a comment
    for text, why in (("1,2", "it has 2 columns, the header has 3"), ("a,1,soon", "'soon' is not a time")):
        with pytest.raises(BadLine, match=why):
            reader.read(text)
    reader = LineReader(Choice(), features=2)
    assert reader.read("stream,a,b,label") is None
    with pytest.raises(BadLine, match=r"it has 3 numbers, a frame has 2: .* name those of the frame with --columns"):
        reader.read("m,1,2,3")


@pytest.mark.parametrize(
    ("column", "text", "ns"),
    [
        ("time_ns", "1700000000123456789", 1_700_000_000_123_456_789),
        ("t_us", "1.5", 1500),
        ("time_ms", "2", 2_000_000),
        ("time_s", "0.25", 250_000_000),
        ("time", "1e3", 10**12),
        ("time", "1970-01-01T00:00:01.123456789Z", 1_123_456_789),
        ("time", "1970-01-01 01:00:00.5+01:00", 500_000_000),
        ("when", "1970-01-02", 86_400 * 10**9),
    ],
)
def test_times(column: str, text: str, ns: int) -> None:
    reader = LineReader(Choice(time=column))
    assert reader.read(f"{column},x0") is None
    assert read(reader, f"{text},1").time_ns == ns


@pytest.mark.parametrize(
    ("choice", "first", "why"),
    [
        (Choice(columns=("lefd",)), "left,right", "there is no column 'lefd'; did you mean 'left'"),
        (Choice(time="when"), "a,b,c", "there is no column 'when'; its columns are a, b, c"),
        (Choice(columns=("a",)), "1,2,3", "--columns and --time name columns, but the first line does not"),
        (Choice(columns=("a",)), "a,b,c", "--columns names 1 column, a frame of the model has 2"),
    ],
)
def test_columns_that_are_not_there(choice: Choice, first: str, why: str) -> None:
    with pytest.raises(CommandProblem) as failure:
        LineReader(choice, features=2).read(first)
    assert why in str(failure.value)


def test_whole_files(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("\ufeff# two numbers\n1,2\n3 4\n", encoding="utf-8")
    (tmp_path / "many.txt").write_text("stream,time_s,seq,x\na,0,5,1\nb,0.5,0,2\na,1,6,3\n")
    one, many = read_sequences(tmp_path / "one.csv"), read_sequences(tmp_path / "many.txt")
    assert (one.names, one.frames.tolist(), one.outputs, one.times_ns) == (("one",), [[1, 2], [3, 4]], None, None)
    assert (many.names, many.lengths.tolist(), many.frames.tolist()) == (("a", "b"), [2, 1], [[1], [3], [2]])
    assert many.times_ns is not None
    assert many.times_ns.tolist() == [0, 10**9, 5 * 10**8]
    assert many.answered is not None
    assert many.answered.tolist() == [False, False, True]
    assert many.notes == (
        "1 stream begins after the first frame, and the file does not hold the state there: "
        "the outputs cannot be compared",
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no frames"),
        ("x,y\n", "holds no frames"),
        ("1 2\n3\n4 x\n5 6\n", "line 2: it has 1 number, a frame has 2; line 3: 'x' is not a number"),
        ("1 2\n" + "x\n" * 9, "line 6: it has 1 number, a frame has 2; and 4 more"),
        (
            "a 1\nb x\n",
            "line 1: 'a' is not a number; line 2: 'b' is not a number: if 'a' names the stream, give --named",
        ),
        (
            "f0,label,f1\n1,a,2\n3,b,4\n",
            "line 2: 'a' is not a number; line 3: 'b' is not a number; name the frame's columns with --columns",
        ),
        (
            "device,f0\na,1\n",
            "name the frame's columns with --columns, and give --named if 'device' names the stream",
        ),
        ("f0;f1\n1;2\n", f"line 2: '1;2' is not a number{SEMICOLONS}"),
        ("f0;f1\n1,5;2,5\n", f"line 2: it has 3 columns, the header has 1{SEMICOLONS}; decimals need a point"),
        ("1;2\n3;4\n", f"line 2: '3;4' is not a number{SEMICOLONS}"),
        ("time_s,x\n2,0\n1,0\n", "the times of a stream must never go back"),
        ("seq,x\n0,0\n2,0\n", "stream 'a' has frame 2 where frame 1 belongs"),
        ("seq,x\n0,0\n0,0\n", "stream 'a' has frame 0 where frame 1 belongs"),
        ("seq,x\n0.5,0\n", "'0.5' is not a whole number"),
        ("seq,x\n9223372036854775808,0\n", "9223372036854775808 is too large"),
        ("time,x\n1e11,0\n", "1e11 is too large"),
        ('x,y\n"' + "1" * 140_000 + ",2\n", "it cannot be split into columns"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadFile) as failure:
        read_sequences(tmp_path / "a.csv")
    assert why in str(failure.value)
    assert str(tmp_path / "a.csv") in str(failure.value)


def test_a_bad_value_in_a_column_of_numbers_is_no_reason_for_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("f0,f1\n1,2\n3,oh\n")
    with pytest.raises(BadFile, match=r"line 3: 'oh' is not a number$"):
        read_sequences(tmp_path / "a.csv")
