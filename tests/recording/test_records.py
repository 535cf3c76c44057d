"""Records: which engine may continue a recording, and which streams are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep.recording.errors import NoSuchStream, RecordingError
from instep.recording.records import StreamInfo, changed_values, refuse_other_model, select_streams
from tests.support.recordings import gru_description, make_gru, make_header


def header(**changes: Any) -> Any:
    return make_header(gru_description(make_gru(3, 4)), **changes)


def test_only_another_model_is_refused() -> None:
    other = header(model_fingerprint="cd" * 32, model_name="other")
    with pytest.raises(RecordingError, match=r"a\.rec.*'test'.*'other'"):
        refuse_other_model(Path("a.rec"), header(), other)
    refuse_other_model(Path("a.rec"), header(), header(arithmetic="torch 1.9 on cuda:0", model_folder="elsewhere"))


def test_what_changed_and_matters() -> None:
    now = header(arithmetic="torch 1.9 on cuda:0", durability="fsync", model_folder="elsewhere", created_ns=5)
    assert changed_values(header(), now) == {"arithmetic": "torch 1.9 on cuda:0", "durability": "fsync"}
    assert changed_values(now, now) == {}
    named = header(output_names=("a", "b", "c", "d"))
    assert changed_values(header(), named) == {"output_names": ("a", "b", "c", "d")}


def opened(*names: str) -> list[StreamInfo]:
    return [StreamInfo(at, name, at, 0, 0, at, *[None] * 6) for at, name in enumerate(names, start=1)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], [0, 1, 2, 3]),
        (["a"], [0, 2]),
        (["b", "a"], [0, 1, 2]),
        (["2"], [1]),
        (["1"], [3]),
        (["4"], [3]),
        (["a", "3", "a"], [0, 2]),
        (["[ab]"], [0, 1, 2]),
        (["?", "4"], [0, 1, 2, 3]),
    ],
)
def test_names_come_before_numbers(wanted: list[str], found: list[int]) -> None:
    assert select_streams(opened("a", "b", "a", "1"), wanted) == found


@pytest.mark.parametrize(
    ("names", "wanted", "near"),
    [
        ((), "mic", ""),
        (("zzz",), "mic", "zzz"),
        (("mic-1", "mic-1", "zz"), "mic", "mic-1"),
        (("mic-1", "mic-2", "x"), "mic1", "mic-2"),
    ],
)
def test_one_that_is_not_there_is_named_with_what_is(names: tuple[str, ...], wanted: str, near: str) -> None:
    with pytest.raises(NoSuchStream) as caught:
        select_streams(opened(*names), [wanted])
    assert repr(wanted) in str(caught.value)
    assert near in str(caught.value)
