from __future__ import annotations

import pytest

from instep.recording.records import StreamInfo
from instep.verify.errors import CannotVerify
from instep.verify.select import select_streams


def infos(*names: str) -> list[StreamInfo]:
    return [StreamInfo(number, name, number, 0, 0, number, *[None] * 6) for number, name in enumerate(names, start=1)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [0, 1, 2, 3]),
        ("mic", [0, 2]),  # every opening of that name
        ("cam", [1]),
        ("2", [1]),  # the number of an opening
        ("4", [3]),
    ],
)
def test_names_and_numbers(wanted: str | None, found: list[int]) -> None:
    assert select_streams(infos("mic", "cam", "mic", "44"), wanted).tolist() == found


def test_a_name_counts_before_a_number() -> None:
    assert select_streams(infos("a", "1"), "1").tolist() == [1]


@pytest.mark.parametrize(
    ("names", "wanted", "sentence"),
    [
        (("left", "right"), "rihgt", "the recording has no stream 'rihgt'; did you mean 'right'?"),
        (("mic-1", "mic-2", "x"), "mic1", "did you mean 'mic-1' or 'mic-2'?"),
        (("left", "right"), "zzz", "it has 2 streams, from 'left' to 'right'"),
        (("left",), "99", "its only stream is 'left'"),
        ((), "left", "it has no streams at all"),
    ],
)
def test_unknown_streams(names: tuple[str, ...], wanted: str, sentence: str) -> None:
    with pytest.raises(CannotVerify) as raised:
        select_streams(infos(*names), wanted)
    assert sentence in str(raised.value)
