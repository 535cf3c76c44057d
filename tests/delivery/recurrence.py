"""The network and its executor: an exact recurrence that remembers order, stepped when told."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from instep.core.typing import F32, I64, U8
from instep.runtime.executor import RunResult, Step, run_steps
from tests.support.states import floats_of, gru_state, rows_of

PRIME = 16_777_213
"""The largest prime below 2^24: every state is a float32 without rounding."""
_FACTOR = 1_103_515
MAX_STREAMS = 3


def recur(state: int, x: int) -> int:
    """The state after one more frame. Whatever is lost, doubled or swapped changes all that follow."""
    return (state * _FACTOR + x * 7 + 1) % PRIME


class StepFailure(Exception):
    """The network failed; no state has changed."""


class HandExecutor:
    """Steps when told."""

    capacity = 2
    signal_fd = None

    def __init__(self, step: Step) -> None:
        self.begun: deque[tuple[I64, I64]] = deque()
        self._step = step
        self._results: list[RunResult] = []
        self._slots_of_results: list[I64] = []
        self._now_ns = 0

    @property
    def has_ended(self) -> bool:
        return bool(self._results)

    def begin(self, slots: I64, rows: I64, expected_ns: int, loop_ns: int = 0) -> None:
        self.begun.append((slots, rows))

    def work(self) -> None:
        """Step the oldest run, if there is one; the loop learns of it in its next turn."""
        if not self.begun:
            return
        slots, rows = self.begun.popleft()
        result = run_steps(self._step, slots, rows)
        if isinstance(result.error, AssertionError):
            raise result.error
        self._now_ns += 1  # no time passes, so that an example is the same on every machine
        self._results.append(replace(result, began_ns=self._now_ns, ended_ns=self._now_ns))
        self._slots_of_results.append(slots)

    def ended(self) -> list[RunResult]:
        results, self._results, self._slots_of_results = self._results, [], []
        return results

    def take_signal(self) -> None:
        """There is none: `Node.run` lets the loop take a turn."""

    def answered(self) -> None:
        """Nothing was put off."""

    def is_under_way(self, slots: I64) -> bool:
        """Whether runs of these streams are, as far as the loop knows."""
        under_way = [begun for begun, _ in self.begun] + self._slots_of_results
        return any(np.isin(slots, run).any() for run in under_way)

    def stop(self, timeout_s: float | None = None) -> None:
        """Nothing steps by itself."""


class Recurrence:
    """In place of the stepper: state and output of a stream are one number."""

    state = gru_state(1, 1)

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.executor: HandExecutor
        self.failure: Exception | None = None
        """Raised by a step, instead of stepping."""
        self.steps_before_failure = 0
        self._states = np.zeros(MAX_STREAMS + 1, np.int64)

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        assert len(set(slots.tolist())) == len(slots), "a stream has two frames in one step"
        if self.failure is not None and self.steps_before_failure == 0:
            failure, self.failure = self.failure, None
            raise failure
        self.steps_before_failure = max(0, self.steps_before_failure - 1)
        with np.errstate(invalid="ignore"):  # damaged frames are wrong ones
            x = inputs[rows, 0].astype(np.int64)
        states = (self._states[slots] * _FACTOR + x * 7 + 1) % PRIME
        self._states[slots] = states
        outputs[rows, 0] = states

    def load(self, slots: I64, rows: U8 | None) -> None:
        assert not self.executor.is_under_way(slots), "a state is written while its stream steps"
        with np.errstate(invalid="ignore"):  # and so are damaged states
            self._states[slots] = 0 if rows is None else floats_of(rows, 1)[:, 0].astype(np.int64)

    def read(self, slots: I64) -> U8:
        assert not self.executor.is_under_way(slots), "a state is read while its stream steps"
        return rows_of(self._states[slots])
