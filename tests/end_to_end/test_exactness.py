"""Three hundred streams at random, for five models: the bits of every answer are those of the whole recording."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

import numpy as np
import pytest
import torch
from torch import nn

from instep.core.typing import F32, F64
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.recurrent.description import DenseLayer, FrameLayer, GruDescription, GruLayers
from instep.server.preparation import Prepared
from tests.support.models import SEED_SIZED, gru_of, plain, with_head
from tests.support.raw import RawClient
from tests.support.running import prepared, running
from tests.support.traffic import Producer, Recorded, assert_same_bits, make_recordings

pytestmark = pytest.mark.heavy

STREAMS = 300
CONNECTIONS = 5

DENSE = make_model(
    GruDescription(
        features=20,
        before=(DenseLayer(size=50, activation="relu"), DenseLayer(size=30, activation="tanh")),
        gru=GruLayers(hidden_size=400, num_layers=2),
        after=(DenseLayer(size=37, activation="sigmoid"), DenseLayer(size=9)),
    ),
    init="random",
    seed=7,
    name="dense-400x2",
)
MODELS: dict[str, tuple[Model, list[int]]] = {
    "3-4": (SEED_SIZED, [1, 90, 177, 300]),
    "40-128": (plain(40, 128), [1, 50, 83, 150]),
    "2x256": (plain(40, 256, layers=2), [1, 25, 50, 77]),
    "2x400-dense": (DENSE, [1, 20, 37, 60]),
    "12-64-head": (with_head(12, 64, 9), [1, 50, 83, 150]),
}
"""Each model with the lengths of recordings that it is given."""


def by_length(recordings: Sequence[Recorded]) -> Iterator[list[Recorded]]:
    groups: dict[int, list[Recorded]] = defaultdict(list)
    for recording in recordings:
        groups[len(recording.x)].append(recording)
    yield from groups.values()


def stacked(model: Model, group: Sequence[Recorded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings of one length side by side: x [T, R, features] and initial states [L, R, H]."""
    zeros = np.zeros(model.description.state.leaves[0].shape, np.float32)
    initial = [zeros if recording.initial is None else recording.initial for recording in group]
    x = np.stack([recording.x for recording in group], axis=1)
    return torch.from_numpy(x), torch.from_numpy(np.stack(initial, axis=1))


def by_definition(ready: Prepared, group: Sequence[Recorded]) -> tuple[F32, F32]:
    """Outputs and final states of whole recordings of one length."""
    x, h = stacked(ready.model, group)
    definition = ready.network.definition()
    assert definition is not None
    y, after = definition.run(x.numpy(), {"h": h.numpy().swapaxes(0, 1)}, np.full(len(x), len(group)))
    return y, after["h"].swapaxes(0, 1)


@torch.inference_mode()
def whole_of_modules(model: Model, group: Sequence[Recorded]) -> tuple[F64, F64]:
    """torch's own modules in float64, nothing padded: a reference for tolerance."""
    description = gru_of(model)
    activations = {"none": nn.Identity(), "relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}

    def dense(place: str, layers: Sequence[FrameLayer], inputs: int) -> nn.Module:
        modules: list[nn.Module] = []
        for index, layer in enumerate(layers):
            assert isinstance(layer, DenseLayer)
            linear = nn.Linear(inputs, layer.size)
            linear.load_state_dict(
                {name: model.weights[f"{place}.{index}.{name}"] for name in ("weight", "bias")},
            )
            modules += [linear, activations[layer.activation]]
            inputs = layer.size
        return nn.Sequential(*modules).double()

    gru = nn.GRU(description.recurrent_inputs, description.gru.hidden_size, description.gru.num_layers)
    gru.load_state_dict(
        {name.removeprefix("gru."): each for name, each in model.weights.items() if name.startswith("gru.")}
    )
    x, h = stacked(model, group)
    before = dense("before", description.before, description.features)
    after = dense("after", description.after, description.gru.hidden_size)
    y, final = gru.double()(before(x.double()), h.double())
    return after(y).numpy(), final.numpy()


@pytest.mark.parametrize("name", MODELS)
async def test_what_is_streamed_is_what_the_network_computes_over_the_whole_recording(name: str) -> None:
    model, lengths = MODELS[name]
    ready = prepared(model)
    rng = np.random.default_rng(len(name))
    recordings = make_recordings(rng, model, STREAMS, lengths)
    # Fewer slots than streams, so that slots change hands; fewer rows than open streams, so that batches differ.
    engine = {"max_streams": 20 * CONNECTIONS, "max_batch_size": 64}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(model, engine=engine, apart=True))
        producers = []
        for index in range(CONNECTIONS):
            client = await stack.enter_async_context(RawClient(server.endpoint))
            mine = recordings[index::CONNECTIONS]
            producers.append(Producer(client, mine, model, np.random.default_rng(index), at_once=20))
        await asyncio.gather(*(producer.run() for producer in producers))
        assert server.default.engine.stats.frames_total == sum(len(recording.x) for recording in recordings)
        assert server.default.engine.table.open_count == 0
        assert server.default.engine.pending_frames == 0
    assert sum(producer.refused for producer in producers) > STREAMS / 10

    for group in by_length(recordings):
        y, final = np.stack([each.y for each in group], axis=1), np.stack([final_of(each) for each in group], axis=1)
        expected_y, expected_final = by_definition(ready, group)
        assert_same_bits(y, expected_y, f"outputs of {[recording.name for recording in group]}")
        assert_same_bits(final, expected_final, f"final states of {[recording.name for recording in group]}")
        close_y, close_final = whole_of_modules(model, group)
        np.testing.assert_allclose(y, close_y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(final, close_final, rtol=1e-4, atol=1e-5)


def final_of(recording: Recorded) -> F32:
    assert recording.final is not None
    return recording.final
