"""Streams stepped over their slots: the truth is the definition over whole recordings, or the user's own module."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I64
from instep.models.model import Model
from instep.runtime.stepper import Stepper
from tests.support.models import SMALL, plain, whole, with_head
from tests.support.running import CPU, prepared
from tests.support.states import floats_of, rows_of
from tests.support.steps import FEATURES, eager, exported

F, H = 5, 8


def stepper(model: Model) -> Stepper:
    """With 64 slots."""
    return Stepper(prepared(model).network, 64, 64, CPU)


def read(steps: Stepper, slots: I64, layers: int = 1) -> F32:
    return floats_of(steps.read(slots), layers, steps.state.row_bytes // 4 // layers)


def step(steps: Stepper, slots: I64, x: F32) -> F32:
    rows = np.arange(len(slots))
    y = np.full((len(slots), steps.model.description.outputs), np.nan, np.float32)
    steps.step(slots, rows, x, y)
    return y


def test_streams_in_ever_other_batches_equal_their_whole_recording(rng: np.random.Generator) -> None:
    model = plain(F, H, layers=2)
    steps = stepper(model)
    x = rng.standard_normal((9, 20, F)).astype(np.float32)
    outputs = np.zeros((9, 20, H), np.float32)
    at = np.zeros(20, np.int64)
    while (at < 9).any():
        chosen = rng.permutation(np.flatnonzero(at < 9))[: rng.integers(1, 21)]
        outputs[at[chosen], chosen] = step(steps, chosen + 1, x[at[chosen], chosen])
        at[chosen] += 1
    for stream in range(20):
        y, final = whole(model, x[:, stream])
        np.testing.assert_array_equal(outputs[:, stream], y)
        np.testing.assert_array_equal(read(steps, np.array([stream + 1]), 2)[0], final)


def test_leaves_of_every_dtype_are_stepped_where_they_are(rng: np.random.Generator) -> None:
    steps, slots = stepper(exported("counting")), np.array([9, 2, 64])
    steps.load(slots, None)
    x = 2 * rng.standard_normal((12, 3, FEATURES)).astype(np.float32)
    y = np.stack([step(steps, slots, frames) for frames in x])
    found = steps.state.unpack(steps.read(slots))
    for stream in range(3):
        truth, final = eager("counting", x[:, stream], 1)
        np.testing.assert_allclose(y[:, stream], truth, rtol=1e-5, atol=1e-6)
        for leaf, values in zip(final, found.values(), strict=True):
            np.testing.assert_allclose(values[stream], leaf, rtol=1e-5, atol=1e-5)


def test_a_step_touches_only_the_streams_and_rows_that_it_is_given(rng: np.random.Generator) -> None:
    steps, everyone = stepper(SMALL), np.arange(1, 65)
    for count in (1, 3, 20):
        steps.load(everyone, rows_of(rng.standard_normal((64, 1, H))))
        before = read(steps, everyone)
        slots, rows = rng.permutation(everyone)[:count], rng.permutation(40)[:count]
        x, y = rng.standard_normal((40, F)).astype(np.float32), np.full((40, H), np.nan, np.float32)
        steps.step(slots, rows, x, y)
        after = read(steps, everyone)
        changed = np.flatnonzero((before != after).any(axis=(1, 2))) + 1
        assert changed.tolist() == sorted(slots)
        assert np.flatnonzero(~np.isnan(y).all(axis=1)).tolist() == sorted(rows)
        for slot, row in zip(slots, rows, strict=True):
            expected, final = whole(SMALL, x[row : row + 1], before[slot - 1])
            np.testing.assert_array_equal(y[row], expected[0])
            np.testing.assert_array_equal(after[slot - 1], final)
        assert not steps.read(np.array([0])).any(), "no stream has slot 0"


def test_loading_gives_zeros_or_the_given_state(rng: np.random.Generator) -> None:
    steps = stepper(with_head(F, 10, 3))
    slots = np.array([3, 1])
    states = rng.standard_normal((2, 1, 10)).astype(np.float32)
    steps.load(slots, rows_of(states))
    np.testing.assert_array_equal(read(steps, slots), states)
    steps.load(slots[:1], None)
    assert not steps.read(slots[:1]).any()
    np.testing.assert_array_equal(read(steps, slots[1:]), states[1:])
