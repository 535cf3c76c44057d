"""The models that tests serve, and their truth: the definition of the arithmetic over whole recordings."""

from __future__ import annotations

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.base import RecurrentModel, Reference
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers


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
    rows = network.state.pack({"h": np.ascontiguousarray(h.swapaxes(0, 1))})
    outputs = []
    for frame in x:
        y, rows = network.step(frame, rows)
        outputs.append(y)
    return np.stack(outputs), network.state.unpack(rows)["h"].swapaxes(0, 1)


def whole(model: Model, x: F32, h: F32 | None = None) -> tuple[F32, F32]:
    """The truth for one recording of a model with the state `h`: by the definition, the bits of a server's answers.

    Args:
        model: served on a CPU.
        x: float32 [T, features].
        h: initial state, float32 [layers, hidden].

    Returns:
        y float32 [T, outputs], final state float32 [layers, hidden].
    """
    if model.fingerprint not in _DEFINITIONS:
        _DEFINITIONS[model.fingerprint] = PortableNetwork(model).definition()
    state = model.state.unpack(model.state.initial(1)) if h is None else {"h": h[None]}
    active = np.ones(len(x), np.int64)
    y, after = _DEFINITIONS[model.fingerprint].run(x[:, None], state, active)
    return y[:, 0], after["h"][0]


_DEFINITIONS: dict[str, Reference] = {}
"""By fingerprint."""
