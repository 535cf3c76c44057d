from __future__ import annotations

import json

import numpy as np

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


def test_one_bit_is_a_difference_and_is_found() -> None:
    y = np.arange(10, dtype=np.float32).reshape(5, 2)
    now = y.copy()
    now[3, 1] = np.nextafter(now[3, 1], np.float32(np.inf))
    now[4] += 1
    result = compare(with_outputs(y), now, ALL)
    assert (result.frames, result.different, result.streams_different) == (5, 2, 1)
    assert result.first is not None
    assert (result.first.stream, result.first.frame, result.first.element) == ("b", 1, 1)
    assert json.loads(json.dumps(result.as_json()))["first"]["element"] == 1


def test_zeros_have_signs() -> None:
    y = np.zeros((5, 1), np.float32)
    assert compare(with_outputs(y), -y, ALL).different == 5
