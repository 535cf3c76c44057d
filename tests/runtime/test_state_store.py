"""States in rows of bytes: what the compiled loops and torch copy, for states and strides of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from instep.models.base import Leaf, StateSpec
from instep.models.recurrent.network import RecurrentNetwork
from instep.runtime.state_store import StateCopies, StateStore
from instep_client.protocol.state_spec import DTYPES
from tests.support.models import plain, whole
from tests.support.running import prepared
from tests.support.states import floats_of

CPU = torch.device("cpu")
SPEC = StateSpec(
    (
        Leaf("open", (3,), DTYPES["bool"]),
        Leaf("h", (2, 5), DTYPES["float32"], 0.5),
        Leaf("count", (), DTYPES["int64"], -7),
        Leaf("sums", (2, 2, 2), DTYPES["float64"]),
    )
)
TORCH = {"bool": torch.bool, "float32": torch.float32, "int64": torch.int64, "float64": torch.float64}


class Buffers:
    """The buffers of a step that computes nothing: contiguous, padded, or with layers first."""

    def __init__(self, rows: int, layout: str) -> None:
        self.state = {leaf.name: buffer(leaf, rows, layout) for leaf in SPEC.leaves}
        self.new_state = {leaf.name: buffer(leaf, rows, layout) for leaf in SPEC.leaves}


def buffer(leaf: Leaf, rows: int, layout: str) -> torch.Tensor:
    dtype = TORCH[leaf.dtype.name]
    if layout == "padded" and leaf.shape:
        *outer, inner = leaf.shape
        return torch.zeros(rows, *outer, inner + 3, dtype=dtype)[..., :inner]
    if layout == "layers first" and len(leaf.shape) > 1:
        first, *rest = leaf.shape
        return torch.zeros(1 + first, rows, *rest, dtype=dtype)[1:].transpose(0, 1)
    return torch.zeros(rows, *leaf.shape, dtype=dtype)


def random_rows(rng: np.random.Generator, count: int) -> Any:
    rows = SPEC.initial(count)
    for leaf in SPEC.unpack(rows).values():
        leaf[...] = rng.integers(0, 2, leaf.shape) if leaf.dtype == np.bool_ else rng.integers(-9, 9, leaf.shape)
    return rows


def numpy_of(leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: leaf.cpu().numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("layout", ["contiguous", "padded", "layers first"])
def test_gather_and_scatter_copy_the_rows_of_the_given_slots(rng: np.random.Generator, layout: str) -> None:
    store = StateStore(SPEC, 6, CPU)
    everyone = np.arange(1, 7)
    rows = random_rows(rng, 6)
    store.write(everyone, rows)
    step = Buffers(4, layout)
    copies = StateCopies(store, step)  # type: ignore[arg-type]
    slots = np.array([5, 2, 6, 0])
    copies.gather(slots)
    expected = np.concatenate([rows[[4, 1, 5]], SPEC.initial(1)])
    assert SPEC.pack(numpy_of(step.state)).tobytes() == expected.tobytes()

    after = random_rows(rng, 4)
    for name, leaf in SPEC.unpack(after).items():
        step.new_state[name].numpy()[...] = leaf
    copies.scatter(slots, 3)
    rows[[4, 1, 5]] = after[:3]
    assert store.read(everyone).tobytes() == rows.tobytes()
    assert store.read(np.array([0])).tobytes() == SPEC.initial(1).tobytes()


def test_strides_that_cannot_be_copied_in_runs_are_refused() -> None:
    step = Buffers(4, "contiguous")
    step.state["sums"] = torch.zeros(4, 3, 3, 3, dtype=torch.float64)[:, :2, :2, :2]
    with pytest.raises(ValueError, match="leaf sums of the step has strides"):
        StateCopies(StateStore(SPEC, 6, CPU), step)  # type: ignore[arg-type]


def test_torch_copies_the_same_leaves_and_clears_the_scratch_slot(rng: np.random.Generator) -> None:
    store = StateStore(SPEC, 6, CPU)
    everyone = np.arange(1, 7)
    rows = random_rows(rng, 6)
    store.write(everyone, rows)
    step, slots = Buffers(4, "layers first"), torch.tensor([5, 2, 0, 0])
    store.gather(slots, step.state)
    assert SPEC.pack(numpy_of(step.state)).tobytes() == np.concatenate([rows[[4, 1]], SPEC.initial(2)]).tobytes()
    after = random_rows(rng, 4)
    for name, leaf in SPEC.unpack(after).items():
        step.new_state[name].numpy()[...] = leaf
    store.scatter(slots, step.new_state)
    rows[[4, 1]] = after[:2]
    assert store.read(everyone).tobytes() == rows.tobytes()
    assert store.read(np.array([0])).tobytes() == SPEC.initial(1).tobytes()


def test_clearing_gives_the_initial_state_to_these_slots_alone(rng: np.random.Generator) -> None:
    store = StateStore(SPEC, 4, CPU)
    rows = random_rows(rng, 4)
    store.write(np.arange(1, 5), rows)
    store.clear(np.array([2, 4]))
    rows[[1, 3]] = SPEC.initial(2)
    assert store.read(np.arange(1, 5)).tobytes() == rows.tobytes()


def test_rows_that_were_read_are_a_copy(rng: np.random.Generator) -> None:
    store = StateStore(SPEC, 2, CPU)
    read = store.read(np.array([1, 2]))
    read[:] = 9
    assert not (store.read(np.array([1, 2])) == 9).all()


def test_the_steps_of_a_graph_are_those_of_the_whole_sequence(rng: np.random.Generator) -> None:
    model = plain(5, 16, layers=2)
    rows = prepared(model, 512).certification.buckets[0]
    step = RecurrentNetwork(model, CPU).bind(rows)
    store = StateStore(model.description.state, 6, CPU)
    x = rng.standard_normal((4, 2, 5)).astype(np.float32)
    slots = torch.tensor([3, 1] + [0] * (rows - 2))
    for at, frames in enumerate(x):
        step.x[:2] = torch.from_numpy(frames)
        store.gather(slots, step.state)
        step.run()
        store.scatter(slots, step.new_state)
        for stream in range(2):
            np.testing.assert_array_equal(step.y[stream].numpy(), whole(model, x[:, stream])[0][at])
    found = floats_of(store.read(np.array([3, 1])), 2, 16)
    for stream in range(2):
        np.testing.assert_array_equal(found[stream], whole(model, x[:, stream])[1])
    assert not store.read(np.array([0, 2, 4, 5, 6])).any()
