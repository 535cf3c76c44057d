from __future__ import annotations

import numpy as np
import pytest

from instep_tools.lines import BadLine, LineReader


def frame(reader: LineReader, text: str) -> list[float]:
    line = reader.read(text)
    assert line is not None
    assert line.frame.dtype == np.float32
    values: list[float] = line.frame.tolist()
    return values


@pytest.mark.parametrize("text", ["1 2.5 -3e2", "1,2.5,-3e2", " 1 ,\t2.5 , -3e2 \r", "1\t2.5   -300\n"])
def test_numbers_are_separated_by_commas_or_white_space(text: str) -> None:
    assert frame(LineReader(3), text) == [1.0, 2.5, -300.0]


def test_every_float32_survives_in_its_shortest_digits(rng: np.random.Generator) -> None:
    values = rng.integers(0, 0x7F800000, 1000, np.uint32).view(np.float32)
    text = " ".join(str(value) for value in values)
    line = LineReader().read(text)
    assert line is not None
    np.testing.assert_array_equal(line.frame, values)


@pytest.mark.parametrize("text", ["", "  \n", "# a comment, 1, 2"])
def test_empty_lines_and_comments_hold_nothing(text: str) -> None:
    assert LineReader(2).read(text) is None


def test_the_first_good_line_says_how_many_numbers_a_frame_has() -> None:
    reader = LineReader()
    with pytest.raises(BadLine):
        reader.read("1 x")
    assert frame(reader, "1 2") == [1, 2]
    with pytest.raises(BadLine, match="it has 1 number, a frame has 2"):
        reader.read("1")
    assert frame(reader, "3 4") == [3, 4]


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
    reader = LineReader(3)
    assert frame(reader, "0 0 0") == [0, 0, 0]
    with pytest.raises(BadLine) as failure:
        reader.read(text)
    assert why in str(failure.value)
    assert len(str(failure.value)) < 80
    assert frame(reader, "7 8 9") == [7, 8, 9]


def test_the_first_column_names_the_stream() -> None:
    reader = LineReader(2, named=True)
    line = reader.read("mic-1 1 2")
    assert line is not None
    assert (line.stream, line.time_s, line.frame.tolist()) == ("mic-1", None, [1, 2])
    line = reader.read("12, 3, 4")
    assert line is not None
    assert (line.stream, line.frame.tolist()) == ("12", [3, 4])


@pytest.mark.parametrize("text", ["a" * 201 + " 1 2", "a\x7fb 1 2"])
def test_a_bad_name_is_a_bad_line(text: str) -> None:
    reader = LineReader(2, named=True)
    with pytest.raises(BadLine, match="no stream name"):
        reader.read(text)


def test_a_name_without_numbers_is_a_bad_line() -> None:
    reader = LineReader(named=True)
    assert reader.read("mic 1") is not None
    with pytest.raises(BadLine, match="it has 0 numbers"):
        reader.read("mic")
    with pytest.raises(BadLine, match="it holds no numbers"):
        LineReader(named=True).read("mic")


def test_a_first_line_of_words_that_fits_no_frame_is_a_bad_line() -> None:
    reader = LineReader(2)
    with pytest.raises(BadLine, match="it has 1 number, a frame has 2"):
        reader.read("hello")
    assert frame(reader, "1 2") == [1, 2]


def test_a_header_names_the_columns() -> None:
    reader = LineReader()
    assert reader.read("seq,stream,x,time_s,y") is None
    line = reader.read("9,mic,1.5,0.25,2.5")
    assert line is not None
    assert (line.stream, line.time_s, line.frame.tolist()) == ("mic", 0.25, [1.5, 2.5])
    with pytest.raises(BadLine, match="it has 2 columns, the header has 5"):
        reader.read("1,2")
    with pytest.raises(BadLine, match="'soon' is not a number"):
        reader.read("9,mic,1.5,soon,2.5")


def test_a_header_of_named_lines_is_skipped() -> None:
    reader = LineReader(1, named=True)
    assert reader.read("who x") is None
    assert reader.read("who 1") is not None


def test_only_the_first_line_can_be_a_header() -> None:
    reader = LineReader(2)
    assert reader.read("# made by hand") is None
    assert reader.read("x y") is None
    with pytest.raises(BadLine):
        reader.read("x y")
