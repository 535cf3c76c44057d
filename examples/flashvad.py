"""FlashVAD: is somebody talking on the telephone? A graph in ONNX: four causal convolutions and a GRU."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from examples.example import Example, shipped, speech
from instep.core.typing import F32
from instep.models.model import Model
from instep.models.onnx.importer import import_onnx

HOP: Final = 160


def make(folder: Path) -> Model:
    """The package's graph as it is: its four caches and the GRU's state are found by their names."""
    return import_onnx(shipped("flashvad", "flashvad/_models/flashvad-stream.onnx"), folder, overwrite=True)


def frames(sound: F32) -> F32:
    """The package's features, [frames, 43]; `push` would take samples as they come, too."""
    from flashvad.numpy_features import NumpyCausalFeatureExtractor, NumpyStreamingFeatureExtractor

    features: F32 = NumpyStreamingFeatureExtractor(NumpyCausalFeatureExtractor()).push(sound)
    return features


def as_probabilities(logits: F32) -> F32:
    """The graph gives logits."""
    probabilities: F32 = np.reciprocal(1 + np.exp(-logits))
    return probabilities


def own(sound: F32) -> F32:
    """The package's stream: features, one step of onnxruntime a frame, probabilities."""
    from flashvad.runtime import OnnxStreamingVadModel

    heard: F32 = OnnxStreamingVadModel.load_bundled().new_stream().push(sound)[0]
    return heard[:, np.newaxis]


FLASHVAD: Final = Example(make=make, sound=speech, frames=frames, finish=as_probabilities, own=own, hop=HOP)
