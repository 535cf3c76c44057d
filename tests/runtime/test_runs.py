from __future__ import annotations

import time

import numpy as np
from instep.runtime.runs import run_steps

from instep.core.typing import I64


def test_every_step_of_a_run_has_its_rows() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def step(slots: I64, rows: I64) -> None:
        seen.append((slots.tolist(), rows.tolist()))

    before = time.monotonic_ns()
    ended = run_steps(step, np.array([4, 2]), np.array([[1, 2], [3, 4], [5, 6]]))
    assert seen == [([4, 2], [1, 2]), ([4, 2], [3, 4]), ([4, 2], [5, 6])]
    assert (ended.steps, ended.error) == (3, None)
    assert before <= ended.began_ns <= ended.ended_ns <= time.monotonic_ns()


def test_a_run_ends_with_the_first_step_that_fails() -> None:
    failure = ValueError("no")

    def step(slots: I64, rows: I64) -> None:
        if rows[0] == 3:
            raise failure

    ended = run_steps(step, np.array([1]), np.array([[1], [2], [3], [4]]))
    assert (ended.steps, ended.error) == (2, failure)
