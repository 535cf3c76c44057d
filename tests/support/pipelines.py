"""A pipeline of windows that overlap, and its truth: `nn.GRU` over the windows of a whole signal."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.registry import parse_description

HOP, CONTEXT, HIDDEN = 16, 40, 8
WINDOW: Final = HOP + CONTEXT
LISTENS: Final[dict[str, Any]] = {
    "kind": "pipeline",
    "features": HOP,
    "context": CONTEXT,
    "network": {"kind": "gru", "features": WINDOW, "gru": {"hidden_size": HIDDEN}},
}


def listens(description: dict[str, Any] = LISTENS) -> Model:
    """A pipeline with random weights."""
    return make_model(parse_description(description), "random", name="listens", seed=3)


def windows(x: F32) -> F32:
    """The windows of one signal [T, HOP]: [T, WINDOW]."""
    signal = np.concatenate([np.zeros(CONTEXT, np.float32), x.ravel()])
    return np.stack([signal[at : at + WINDOW] for at in range(0, x.size, HOP)])


@torch.inference_mode()
def whole_signal(model: Model, x: F32) -> F32:
    """Outputs of `LISTENS` for one signal [T, HOP]."""
    gru = torch.nn.GRU(WINDOW, HIDDEN)
    gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
    y: F32 = gru(torch.from_numpy(windows(x)))[0].numpy()
    return y
