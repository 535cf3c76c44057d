"""States in rows of bytes: what is copied to a step and back, for leaves of every dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from instep.models.base import Leaf, StateSpec
from instep.models.registry import torch_network
from instep.runtime.stepper import StateStore
from instep_client.protocol.state_spec import DTYPES
from tests.support.models import plain, whole
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


def buffers(rows: int) -> dict[str, torch.Tensor]:
    return {leaf.name: torch.zeros(rows, *leaf.shape, dtype=TORCH[leaf.dtype.name]) for leaf in SPEC.leaves}


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


def test_gathered_stepped_and_scattered_streams_go_through_their_whole_sequence(rng: np.random.Generator) -> None:
    """As on a GPU, with padding rows."""
    model = plain(5, 16, layers=2)
    network = torch_network(model, CPU)
    assert network is not None
    step, store = network.bind(4), StateStore(model.description.state, 6, CPU)
    x = rng.standard_normal((4, 2, 5)).astype(np.float32)
    slots = torch.tensor([3, 1, 0, 0])
    with torch.inference_mode():
        for at, frames in enumerate(x):
            step.x[:2] = torch.from_numpy(frames)
            store.gather(slots, step.state)
            step.run()
            store.scatter(slots, step.state)
            for stream in range(2):
                np.testing.assert_allclose(step.y[stream], whole(model, x[:, stream])[0][at], atol=1e-6)
    found = floats_of(store.read(np.array([3, 1])), 2, 16)
    for stream in range(2):
        np.testing.assert_allclose(found[stream], whole(model, x[:, stream])[1], atol=1e-6)
    assert not store.read(np.array([0, 2, 4, 5, 6])).any()
