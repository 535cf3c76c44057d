from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from instep_client.protocol.wire import F32
from instep_tools.compare import compare
from instep_tools.sequences import RecordedSequences

ALL = np.ones(5, np.bool_)


def with_outputs(outputs: F32 | None) -> RecordedSequences:
    return RecordedSequences(("a", "b"), np.array([2, 3]), np.zeros((5, 1), np.float32), outputs=outputs)


def test_equal_bits() -> None:
    y = np.array([[0.0, np.nan]] * 5, np.float32)
    result = compare(with_outputs(y), y.copy(), ALL)
    assert (result.frames, result.different, result.streams_different, result.first) == (5, 0, 0, None)
    assert result.sentence("exact") == "all 5 equal those in the file, bit for bit"


def test_one_bit_is_a_difference_and_is_found() -> None:
    y = np.arange(10, dtype=np.float32).reshape(5, 2)
    now = y.copy()
    now[3, 1] = np.nextafter(now[3, 1], np.float32(np.inf))
    now[4] += 1
    result = compare(with_outputs(y), now, ALL)
    assert (result.frames, result.different, result.streams_different) == (5, 2, 1)
    assert result.first is not None
    assert (result.first.stream, result.first.frame, result.first.element) == ("b", 1, 1)
    assert result.first.sentence().endswith("recorded 7.0, now 7.0000005")
    assert result.sentence("exact") == "2 of 5 frames differ from those in the file, in 1 stream"
    assert "(the server is not exact)" in result.sentence("tolerance")
    assert json.loads(json.dumps(result.as_json()))["first"]["element"] == 1


def test_zeros_have_signs() -> None:
    y = np.zeros((5, 1), np.float32)
    assert compare(with_outputs(y), -y, ALL).different == 5


def test_only_frames_that_were_answered_then_and_now_are_compared() -> None:
    y = np.arange(5, dtype=np.float32)[:, None]
    recorded = replace(with_outputs(y), answered=np.array([True, False, True, True, True]))
    result = compare(recorded, -y - 1, np.array([False, True, True, True, False]))
    assert (result.total, result.frames, result.different, result.streams_different) == (5, 2, 2, 1)
    assert not result.complete
    assert (
        result.sentence("exact")
        == "2 of 5 frames were compared: 2 of 2 frames differ from those in the file, in 1 stream"
    )
    assert result.first is not None
    assert (result.first.stream, result.first.frame) == ("b", 0)


def test_nothing_to_compare() -> None:
    y = np.zeros((5, 1), np.float32)
    assert compare(with_outputs(y), y, ~ALL).sentence("exact") == "there was nothing to compare"
    with pytest.raises(ValueError, match="must be recorded outputs"):
        compare(with_outputs(None), y, ALL)
