"""Steps and states of streams in their slots, against the definition, torch and rows of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from instep.core.typing import F32, I64
from instep.models.base import Leaf, StateSpec
from instep.models.model import Model
from instep.runtime.stepper import StateStore, Stepper
from instep_client.protocol.state_spec import DTYPES
from tests.support.models import SMALL, whole
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


SPEC = StateSpec(
    (
        Leaf("open", (3,), DTYPES["bool"]),
        Leaf("h", (2, 5), DTYPES["float32"], 0.5),
        Leaf("count", (), DTYPES["int64"], -7),
        Leaf("sums", (2, 2, 2), DTYPES["float64"]),
    )
)


def buffers(rows: int) -> dict[str, torch.Tensor]:
    return {leaf.name: torch.zeros(rows, *leaf.shape, dtype=getattr(torch, leaf.dtype.name)) for leaf in SPEC.leaves}


def random_rows(rng: np.random.Generator, count: int) -> Any:
    rows = SPEC.initial(count)
    for leaf in SPEC.unpack(rows).values():
        leaf[...] = rng.integers(0, 2, leaf.shape) if leaf.dtype == np.bool_ else rng.integers(-9, 9, leaf.shape)
    return rows


def numpy_of(leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: leaf.cpu().numpy() for name, leaf in leaves.items()}


def test_gather_and_scatter_copy_the_rows_of_the_given_slots(rng: np.random.Generator) -> None:
    store = StateStore(SPEC, 6, CPU)
    everyone = np.arange(1, 7)
    rows = random_rows(rng, 6)
    store.write(everyone, rows)
    leaves, slots = buffers(4), torch.tensor([5, 2, 0, 0])
    store.gather(slots, leaves)
    assert SPEC.pack(numpy_of(leaves)).tobytes() == np.concatenate([rows[[4, 1]], SPEC.initial(2)]).tobytes()
    after = random_rows(rng, 4)
    for name, leaf in SPEC.unpack(after).items():
        leaves[name].numpy()[...] = leaf
    store.scatter(slots, leaves)
    rows[[4, 1]] = after[:2]
    assert store.read(everyone).tobytes() == rows.tobytes()
    assert store.read(np.array([0])).tobytes() == SPEC.initial(1).tobytes(), "it is cleared"


def test_clearing_gives_the_initial_state_to_these_slots_alone(rng: np.random.Generator) -> None:
    store = StateStore(SPEC, 4, CPU)
    rows = random_rows(rng, 4)
    store.write(np.arange(1, 5), rows)
    store.clear(np.array([2, 4]))
    rows[[1, 3]] = SPEC.initial(2)
    assert store.read(np.arange(1, 5)).tobytes() == rows.tobytes()
