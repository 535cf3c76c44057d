"""A pipeline of windows that overlap, and its truth: torch's own `stft` and `nn.GRU` over a whole signal."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.registry import parse_description

HOP, CONTEXT, HIDDEN = 16, 48, 8
WINDOW: Final = HOP + CONTEXT
LISTENS: Final[dict[str, Any]] = {
    "kind": "pipeline",
    "features": HOP,
    "before": [{"context": {"values": CONTEXT}}, {"spectrum": {"scale": "log_power", "floor": 1e-3}}],
    "network": {"kind": "gru", "features": WINDOW // 2 + 1, "gru": {"hidden_size": HIDDEN}},
    "after": [{"smooth": 0.75}],
}


def listens(description: dict[str, Any]) -> Model:
    """A pipeline with random weights."""
    return make_model(parse_description(description), "random", name="listens", seed=3)


def gru_inside(model: Model, features: int, hidden: int) -> torch.nn.GRU:
    """The network of a pipeline, as torch's own."""
    gru = torch.nn.GRU(features, hidden)
    gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
    return gru.eval()


def whole_signal(model: Model, x: F32) -> F32:
    """Outputs of `LISTENS` for one signal [T, HOP]."""
    signal = torch.from_numpy(np.concatenate([np.zeros(CONTEXT, np.float32), x.ravel()]))
    window = torch.hann_window(WINDOW)
    spectra = torch.stft(signal, WINDOW, HOP, window=window, center=False, return_complex=True).abs() ** 2
    with torch.inference_mode():
        y = gru_inside(model, WINDOW // 2 + 1, HIDDEN)((spectra + 1e-3).log().T.contiguous())[0]
    return smoothed(y.numpy(), 0.75)


def smoothed(y: F32, keep: float) -> F32:
    """Exponential smoothing, in Python."""
    found = [y[0].tolist()]
    for row in y[1:].tolist():
        found.append([keep * was + (1 - keep) * now for was, now in zip(found[-1], row, strict=True)])
    return np.array(found, np.float32)
