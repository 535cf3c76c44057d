"""The models that tests serve, and their truth: torch's own layers over whole recordings."""

from __future__ import annotations

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.base import RecurrentModel
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.models.stepping import step_rows
from tests.support.running import prepared


def plain(features: int, hidden: int, layers: int = 1, seed: int = 7) -> Model:
    """A GRU without dense layers."""
    description = GruDescription(features=features, gru=GruLayers(hidden_size=hidden, num_layers=layers))
    return make_model(description, init="random", seed=seed, name=f"gru-{features}-{hidden}x{layers}")


def with_head(features: int, hidden: int, outputs: int, seed: int = 7) -> Model:
    """A GRU with a linear head."""
    description = GruDescription(
        features=features, gru=GruLayers(hidden_size=hidden), after=(DenseLayer(size=outputs),)
    )
    return make_model(description, init="random", seed=seed, name=f"gru-{features}-{hidden}-{outputs}")


SEED_SIZED = plain(3, 4)
SMALL = plain(5, 8)


def gru_of(model: Model) -> GruDescription:
    """The description of a model that is a GRU."""
    assert isinstance(model.description, GruDescription)
    return model.description


def torch_gru(model: Model) -> torch.nn.GRU:
    """torch's own GRU with the weights of a model without dense layers."""
    gru = gru_of(model).gru
    module = torch.nn.GRU(model.description.features, gru.hidden_size, gru.num_layers, bias=gru.bias)
    module.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
    return module.eval()


def stepped(network: RecurrentModel, x: F32, h: F32) -> tuple[F32, F32]:
    """Frames [T, R, features] one after another, from states [layers, R, hidden]: outputs and states in those layouts.

    Of a network whose state is one leaf `h`.
    """
    step = network.bind(x.shape[1])
    rows = network.state.pack({"h": np.ascontiguousarray(h.swapaxes(0, 1))})
    outputs = []
    for frame in x:
        y, rows = step_rows(step, network.state, frame, rows, network.description.outputs)
        outputs.append(y)
    return np.stack(outputs), network.state.unpack(rows)["h"].swapaxes(0, 1)


def in_one_call(network: RecurrentModel, x: F32, h: F32) -> tuple[F32, F32]:
    """As `stepped`, but with the whole sequence in one call."""
    whole = network.sequence(x, network.state.pack({"h": np.ascontiguousarray(h.swapaxes(0, 1))}))
    assert whole is not None
    return whole[0], network.state.unpack(whole[1])["h"].swapaxes(0, 1)


_MODULES: dict[str, torch.nn.GRU] = {}
"""By fingerprint: to make one takes longer than a short recording."""


@torch.inference_mode()
def whole(model: Model, x: F32, h: F32 | None = None, max_batch_size: int = 512) -> tuple[F32, F32]:
    """The truth for one recording of a model without dense layers, by `nn.GRU`: the bits that a server's answers have.

    The recording stands in equal rows, as many as the smallest batch that is certified on this machine, since other
    numbers of rows may have other bits. It is one call, or one call a frame where the bits of these differ.

    Args:
        model: without dense layers.
        x: float32 [T, features].
        h: initial state, float32 [layers, hidden].
        max_batch_size: the server's `engine.max_batch_size`.

    Returns:
        y float32 [T, hidden], final state float32 [layers, hidden].
    """
    certification = prepared(model, max_batch_size).certification
    count, gru = certification.buckets[0], gru_of(model).gru
    rows = torch.from_numpy(x.copy()).unsqueeze(1).repeat(1, count, 1)
    states = torch.zeros(gru.num_layers, count, gru.hidden_size)
    if h is not None:
        states = torch.from_numpy(h.copy()).unsqueeze(1).repeat(1, count, 1)
    if model.fingerprint not in _MODULES:
        _MODULES[model.fingerprint] = torch_gru(model)
    module, outputs = _MODULES[model.fingerprint], [rows.new_zeros(0, count, gru.hidden_size)]
    length = len(rows) if certification.whole_sequence else 1
    for first in range(0, len(rows), max(length, 1)):
        y, states = module(rows[first : first + length], states)
        outputs.append(y)
    return torch.cat(outputs)[:, 0].numpy(), states[:, 0].numpy()
