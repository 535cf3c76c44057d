"""The models that tests serve, and their truth: torch's own layers over whole recordings."""

from __future__ import annotations

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.base import RecurrentModel
from instep.models.folder import make_model
from instep.models.gru.description import DenseLayer, GruDescription, GruLayers
from instep.models.model import Model
from instep.models.stepping import step_rows


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


@torch.inference_mode()
def whole(model: Model, x: F32, h: F32 | None = None) -> tuple[F32, F32]:
    """The truth for one recording of a model without dense layers, in one call of `nn.GRU`.

    The recording stands in 32 equal rows: with fewer, torch's kernels may give other bits, on some processors with 8.

    Args:
        model: without dense layers.
        x: float32 [T, features].
        h: initial state, float32 [layers, hidden].

    Returns:
        y float32 [T, hidden], final state float32 [layers, hidden].
    """
    module = torch_gru(model)
    rows = torch.from_numpy(x.copy()).unsqueeze(1).repeat(1, 32, 1)
    initial = None if h is None else torch.from_numpy(h.copy()).unsqueeze(1).repeat(1, 32, 1)
    y, final = module(rows, initial)
    return y[:, 0].numpy(), final[:, 0].numpy()
