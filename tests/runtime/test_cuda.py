"""Models on a GPU, by torch's operators; where there is none, nothing here is known."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
import torch

from instep.core.typing import F32
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.numerics import prepare
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.models.registry import build
from instep.models.torch_network import TorchNetwork
from instep.runtime.stepper import Stepper
from tests.support.models import plain
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.states import floats_of
from tests.support.steps import FEATURES, STEPS, eager, exported
from tests.support.torch_network import TorchNetwork as ModulesOfTorch
from tests.support.traffic import Producer, make_recordings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")

CUDA: Final = torch.device("cuda", 0)
DENSE = make_model(
    GruDescription(
        features=6,
        before=(DenseLayer(size=9, activation="relu"),),
        gru=GruLayers(hidden_size=24, num_layers=2),
        after=(DenseLayer(size=3, activation="sigmoid"),),
    ),
    init="random",
    seed=3,
    name="dense",
)
MODELS = {"plain": plain(6, 16), "two layers": plain(6, 32, layers=2), "dense": DENSE}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    prepare()
    return MODELS[request.param]


def network_of(model: Model) -> TorchNetwork:
    network = build(model, CUDA)
    assert isinstance(network, TorchNetwork)
    assert (network.arithmetic, network.definition()) == ("torch", None)
    return network


def whole(model: Model, x: F32) -> tuple[F32, F32]:
    """The truth by torch's modules on the CPU: x [T, R, features] to outputs and states [R, layers, hidden]."""
    spec = model.description.state
    y, final = ModulesOfTorch(model).run(x, spec.initial(x.shape[1]))
    return y, spec.unpack(final)["h"]


def test_streams_in_ever_other_batches_equal_their_whole_recording(model: Model, rng: np.random.Generator) -> None:
    steps = Stepper(network_of(model), 64, 64, CUDA)
    x = rng.standard_normal((9, 20, model.description.features)).astype(np.float32)
    y = np.zeros((9, 20, model.description.outputs), np.float32)
    at = np.zeros(20, np.int64)
    while (at < 9).any():
        chosen = rng.permutation(np.flatnonzero(at < 9))[: rng.integers(1, 21)]
        answers = np.zeros((len(chosen), model.description.outputs), np.float32)
        steps.step(chosen + 1, np.arange(len(chosen)), x[at[chosen], chosen], answers)
        y[at[chosen], chosen] = answers
        at[chosen] += 1
    truth_y, truth_h = whole(model, x)
    np.testing.assert_allclose(y, truth_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        floats_of(steps.read(np.arange(1, 21)), *truth_h.shape[1:]), truth_h, rtol=1e-5, atol=1e-6
    )
    assert not steps.read(np.arange(21, 65)).any(), "padding touches no other stream"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_module_is_stepped_by_its_graph(name: str, rng: np.random.Generator) -> None:
    model = exported(name)
    steps, slots = Stepper(network_of(model), 16, 20, CUDA), np.array([7, 4, 20])
    steps.load(np.arange(1, 21), None)
    x = rng.standard_normal((9, 3, FEATURES)).astype(np.float32)
    y = np.zeros((9, 3, model.description.outputs), np.float32)
    for frames, answers in zip(x, y, strict=True):
        steps.step(slots, np.arange(3), frames, answers)
    found = steps.state.unpack(steps.read(slots))
    for stream in range(3):
        truth, final = eager(name, x[:, stream], 1)
        np.testing.assert_allclose(y[:, stream], truth, rtol=1e-4, atol=1e-5)
        for leaf, values in zip(final, found.values(), strict=True):
            np.testing.assert_allclose(values[stream], leaf, rtol=1e-4, atol=1e-5)


async def test_what_is_streamed_is_what_the_network_computes(model: Model, rng: np.random.Generator) -> None:
    recordings = make_recordings(rng, model, 40, [1, 5, 12])
    async with (
        running(model, device=CUDA, engine={"device": "cuda", "max_batch_size": 32}) as server,
        RawClient(server.endpoint) as client,
    ):
        await Producer(client, recordings, model, rng, at_once=20).run()
    for recording in recordings:
        if recording.initial is None:
            truth, _ = whole(model, recording.x[:, None])
            np.testing.assert_allclose(recording.y, truth[:, 0], rtol=1e-5, atol=1e-6)
