from __future__ import annotations

import numpy as np
import pytest

from instep.core.typing import F32
from instep.demo.heard import Heard, probabilities, right_after

SPEAKERS = np.array([1, 2], np.int32)


def deciding(*decisions: int) -> F32:
    """Outputs of three speakers that decide so."""
    return np.eye(3, dtype=np.float32)[list(decisions)]


def test_what_came_back_is_kept_in_its_place() -> None:
    heard = Heard([3, 2], outputs=3)
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (0, 0, 0.0)
    heard.add(1, deciding(2), np.array([0.5]))
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (1, 0, 1.0)
    heard.add(1, deciding(0), np.array([0.25]))
    heard.add(0, deciding(0, 1), np.array([1.0, 2.0]))
    assert (heard.frames, heard.finished, heard.accuracy_now(SPEAKERS)) == (4, 1, 0.5)
    assert heard.outputs[1].tolist() == deciding(2, 0).tolist()
    assert heard.outputs[0][:2].tolist() == deciding(0, 1).tolist()
    assert np.isnan(heard.outputs[0][2]).all()
    assert heard.latency_s[1].tolist() == [0.5, 0.25]
    assert heard.answered.tolist() == [2, 2]


def test_a_recording_that_is_over_counts_with_its_last_decision() -> None:
    right = right_after([deciding(0, 1, 1, 0), deciding(0, 2)], SPEAKERS)
    assert right.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_probabilities_are_a_softmax_that_does_not_overflow() -> None:
    outputs = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], np.float32)
    assert probabilities(outputs) == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))
