"""Silero VAD: is somebody talking? A graph in ONNX: a spectrum, convolutions and an LSTM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import numpy as np
import torch
import yaml

from examples.example import SPEECH_RATE, Example, shipped, speech
from instep.core.typing import F32
from instep.models import load_model
from instep.models.model import Model
from instep.models.onnx.importer import Extents, import_onnx

FRAME: Final = 512
CONTEXT: Final = 64
"""The last samples of the frame before, which the graph takes in front of each frame."""


def make(folder: Path) -> Model:
    """The package's graph, in a pipeline that keeps the context of each stream."""
    graph = shipped("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx")
    shapes: dict[str, Extents] = {"input": ("rows", CONTEXT + FRAME)}
    import_onnx(graph, folder, shapes=shapes, constants={"sr": SPEECH_RATE}, overwrite=True)
    network = yaml.safe_load((folder / "model.yaml").read_text())
    fields = {
        "name": network.pop("name"),
        "kind": "pipeline",
        "features": FRAME,
        "context": CONTEXT,
        "network": network,
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return load_model(folder)


def frames(sound: F32) -> F32:
    """Samples as they are, [frames, 512]."""
    return sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)


def own(sound: F32) -> F32:
    """The package's wrapper of onnxruntime, which keeps state and context itself."""
    from silero_vad import load_silero_vad

    with warnings.catch_warnings(action="ignore"):  # it warns that this graph is for 16 kHz only
        vad = load_silero_vad(onnx=True, opset_version=15)
    return np.concatenate([vad(torch.tensor(frame), SPEECH_RATE).numpy() for frame in frames(sound)])


SILERO_VAD: Final = Example(make=make, sound=speech, frames=frames, finish=lambda y: y, own=own, hop=FRAME)
