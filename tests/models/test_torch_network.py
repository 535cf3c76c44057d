"""A network with torch's operators, as on a GPU; `runtime/test_cuda.py` has what only a GPU shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instep.core.typing import F32
from instep.models.errors import ModelError
from instep.models.model import Model
from instep.models.registry import torch_network
from instep.models.torch_network import Leaves, TorchNetwork
from tests.support.models import SMALL, with_head
from tests.support.torch_network import TorchNetwork as Modules
from tests.support.torch_network import random_rows

CPU = torch.device("cpu")


def network_of(model: Model) -> TorchNetwork:
    network = torch_network(model, CPU)
    assert network is not None
    return network


def frames(rng: np.random.Generator, steps: int, rows: int) -> F32:
    return rng.standard_normal((steps, rows, 5)).astype(np.float32)


def test_steps_sequences_and_the_reference_compute_the_same_without_a_promise_of_bits(rng: np.random.Generator) -> None:
    model = with_head(5, 16, 3)
    network, x = network_of(model), frames(rng, 6, 4)
    rows = random_rows(model.state, 4, rng)
    truth, _ = Modules(model).run(x, rows, torch.float64)
    y, after = network.sequence(x, rows)
    np.testing.assert_allclose(y, truth, atol=1e-6)
    stepped = rows
    for frame, outputs in zip(x, truth, strict=True):
        found, stepped = network.step(frame, stepped)
        np.testing.assert_allclose(found, outputs, atol=1e-6)
    np.testing.assert_allclose(model.state.unpack(after)["h"], model.state.unpack(stepped)["h"], atol=1e-6)
    reference = network.reference(np.float64)
    assert reference is not None
    wide = {name: leaf.astype(np.float64) for name, leaf in model.state.unpack(rows).items()}
    np.testing.assert_allclose(reference.run(x.astype(np.float64), wide, np.full(6, 4))[0], truth, rtol=1e-12)
    assert (network.arithmetic, network.definition()) == ("torch", None)


def test_a_step_that_is_bound_keeps_its_buffers(rng: np.random.Generator) -> None:
    network, x = network_of(SMALL), frames(rng, 5, 4)
    step = network.bind(4)
    buffers = [step.x, step.y, *step.state.values()]
    expected, after = network.sequence(x, SMALL.state.initial(4))
    with torch.inference_mode():
        for frame, y in zip(x, expected, strict=True):
            step.x.copy_(torch.from_numpy(frame))
            step.run()
            np.testing.assert_allclose(step.y, y, atol=1e-6)
    np.testing.assert_allclose(step.state["h"], SMALL.state.unpack(after)["h"], atol=1e-6)
    assert all(one is other for one, other in zip(buffers, [step.x, step.y, *step.state.values()], strict=True))


def test_a_leaf_of_another_shape_is_refused() -> None:
    def grows(x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(*x.shape[:2], 8), {"h": torch.zeros(4, 2, 8)}

    with pytest.raises(ModelError, match="leaf h "):
        TorchNetwork(SMALL, CPU, grows).bind(4).run()
