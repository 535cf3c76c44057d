"""Rows of served batches are stepped again in another bucket, wherever steps run."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from functools import cache
from typing import get_args

import numpy as np
import pytest

from instep.core.tables import make_tables, rows_of
from instep.core.typing import F32, I64
from instep.models.base import RecurrentModel
from instep.models.certify import certify
from instep.models.recurrent.step import RecurrentStep
from instep.models.registry import build
from instep.runtime.executor import InlineExecutor, StepExecutor, ThreadExecutor
from instep.runtime.process_executor import ProcessExecutor, shared_zeros
from instep.runtime.recheck import Mismatch, Recheck
from instep.runtime.stepper import Stepper
from tests.support.gated import RARE, Gate, gated
from tests.support.leaky import by_hand, leaky
from tests.support.models import SMALL
from tests.support.running import CPU, prepared

DEADLINE_S = 60
STREAMS, WINDOW, BUCKETS = 64, 4, (4, 8, 16)
LEAKY = leaky(3)
EXECUTORS: dict[str, Callable[[Recheck], StepExecutor]] = {
    "inline": lambda recheck: InlineExecutor(recheck.step, recheck.run),
    "thread": lambda recheck: ThreadExecutor(recheck.step, recheck.run),
    "process": lambda recheck: ProcessExecutor(recheck.step, STREAMS, afterwards=recheck.run),
    "process, inline": lambda recheck: ProcessExecutor(recheck.step, STREAMS, afterwards=recheck.run),
}


class Served:
    """Streams 1 to 64 that step when told; what the engine and the tables do around an executor."""

    def __init__(self, network: RecurrentModel, buckets: tuple[int, ...], every: int) -> None:
        description = network.description
        self.tables = make_tables(
            STREAMS, 1, WINDOW, description.features, description.outputs, 8, 8, 8, zeros=shared_zeros
        )
        self.stepper = Stepper(network, buckets, STREAMS, CPU, shared_zeros)
        self.stepper.load(np.arange(1, STREAMS + 1), None)
        self.recheck = Recheck(self.stepper, self.tables, every, shared_zeros)

    def give(self, slots: I64, x: F32) -> I64:
        """Put one frame of each stream into the frame buffer; its rows."""
        rows = rows_of(self.tables, slots, self.tables.streams["step_seq"][slots])
        self.tables.x[rows] = x
        return rows

    def step(self, slots: I64, x: F32) -> None:
        """One batch in this thread, answered at once."""
        self.recheck.step(slots, self.give(slots, x))
        self.recheck.run()
        self.tables.streams["step_seq"][slots] += 1


@cache
def certified(gate: Gate) -> RecurrentModel:
    """Leaky integrators; called behind this gate, which certification does not notice."""
    network = build(LEAKY, CPU)
    assert certify(network, BUCKETS).exactness == "exact"
    return network


def served_behind(gate: Gate) -> Served:
    """Leaky integrators behind this gate."""
    with gated(gate):
        return Served(certified(gate), BUCKETS, every=1)


def end(executor: StepExecutor) -> None:
    """Wait for the run that is under way, and have it answered."""
    poll = select.poll()
    if executor.signal_fd is not None:
        poll.register(executor.signal_fd, select.POLLIN)
    while not (results := executor.ended()):
        assert poll.poll(DEADLINE_S * 1000), "no run ended"
        executor.take_signal()
    assert results[0].error is None
    executor.answered()


@pytest.mark.parametrize("where", EXECUTORS)
@pytest.mark.parametrize("gate", ["output", "level", "frames"])
def test_a_row_that_only_a_rare_value_makes_differ_is_found(where: str, gate: Gate) -> None:
    served = served_behind(gate)
    slot, seq = np.array([23]), 11
    served.tables.streams["step_seq"][slot] = seq
    served.tables.streams["first_generation"][slot] = 5
    x = np.array([[RARE, 2, 3]], np.float32)
    executor = EXECUTORS[where](served.recheck)
    try:
        executor.begin(slot, served.give(slot, x)[None], 1000 if where == "process, inline" else 0)
        end(executor)
        until = time.monotonic() + DEADLINE_S
        while not served.recheck.mismatches:
            assert time.monotonic() < until
            time.sleep(0.001)
    finally:
        executor.stop()
    y, level, frames = by_hand(LEAKY, x)
    truth = {"output": (1, y[0, 1]), "level": (0, level[0]), "frames": (0, frames)}
    element, value = truth[gate]
    expected = Mismatch(23, 5, seq, 4, 8, gate, element, float(value + 4), float(value + 8))
    assert served.recheck.take_mismatch() == expected
    assert served.recheck.take_mismatch() is None
    assert (served.recheck.frames, served.recheck.mismatches) == (1, 1)


def test_rows_that_a_row_beside_them_changes_are_found(rng: np.random.Generator) -> None:
    served = served_behind("beside")
    slots = np.arange(1, 17)
    x = rng.standard_normal((16, 3)).astype(np.float32)
    for _ in range(10):
        served.step(slots, x)
    assert 10 * 2 <= served.recheck.frames <= 10 * 4, "half of a bucket of 4 or 8"
    assert served.recheck.mismatches == 0
    x[3, 0] = RARE
    for _ in range(100):
        served.step(slots, x)
        if served.recheck.mismatches:
            break
    mismatch = served.recheck.take_mismatch()
    assert mismatch is not None
    assert (mismatch.bucket, mismatch.part, mismatch.element) == (16, "output", 0)
    assert mismatch.served != mismatch.again


def test_an_honest_network_never_differs(rng: np.random.Generator) -> None:
    """Not where it overflows either."""
    ready = prepared(SMALL, 64)
    served = Served(ready.network, ready.certification.buckets, every=1)
    for batch in range(3000):
        slots = rng.permutation(STREAMS)[: rng.integers(1, STREAMS + 1)] + 1
        scale = 1e38 if batch % 100 == 99 else 1.0
        served.step(slots, (rng.uniform(-3, 3, (len(slots), 5)) * scale).astype(np.float32))
        if batch % 100 == 0:
            served.stepper.load(slots, None)
    assert served.recheck.frames > 20_000
    assert served.recheck.mismatches == 0
    assert served.recheck.take_mismatch() is None


def test_a_recheck_comes_after_the_answer_changes_no_stream_and_costs_one_small_step(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    stepped: list[int] = []
    run = RecurrentStep.run

    def counted(step: RecurrentStep) -> None:
        stepped.append(len(step.x))
        run(step)

    ready = prepared(SMALL, 64)
    served, other = (Served(ready.network, ready.certification.buckets, every=every) for every in (10, 0))
    monkeypatch.setattr(RecurrentStep, "run", counted)
    executor, everyone = InlineExecutor(served.recheck.step, served.recheck.run), np.arange(1, STREAMS + 1)
    for batch in range(1, 101):
        slots = everyone[: rng.integers(1, STREAMS + 1)]
        x = rng.standard_normal((len(slots), 5)).astype(np.float32)
        rows = served.give(slots, x)
        stepped.clear()
        executor.begin(slots, rows[None], 0)
        assert [result.steps for result in executor.ended()] == [1]
        assert len(stepped) == 1, "nothing before the answer"
        served_rows = stepped[0]
        states, y = served.stepper.read(everyone), served.tables.y[rows]
        executor.answered()
        assert len(stepped) == (2 if batch % 10 == 0 else 1)
        assert stepped[-1] <= 2 * served_rows
        np.testing.assert_array_equal(served.stepper.read(everyone), states)
        np.testing.assert_array_equal(served.tables.y[rows], y)
        stepped.clear()
        other.step(slots, x)
        assert len(stepped) == 1, "none where they are off"
        np.testing.assert_array_equal(other.stepper.read(everyone), states)
    assert other.recheck.frames == 0


@pytest.mark.parametrize("gate", get_args(Gate))
def test_without_the_rare_value_gates_stay_shut(gate: Gate, rng: np.random.Generator) -> None:
    served = served_behind(gate)
    for size in (1, 3, 4, 7, 16) * 20:
        served.step(np.arange(1, size + 1), rng.standard_normal((size, 3)).astype(np.float32))
    assert served.recheck.frames > 200
    assert served.recheck.mismatches == 0


def test_a_recheck_that_raises_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(SMALL, 64)
    served = Served(ready.network, ready.certification.buckets, every=1)

    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(served.stepper, "step_again", fails)
    served.step(np.array([1]), np.zeros((1, 5), np.float32))
    assert (served.recheck.frames, served.recheck.mismatches, served.recheck.failures) == (0, 0, 1)
