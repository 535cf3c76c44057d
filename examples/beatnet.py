"""BeatNet: where are the beats of this music? A convolution over the frequencies of each frame, and two LSTMs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from examples.example import Example, read_sound, shipped
from instep.core.typing import F32
from instep.models.model import Model
from instep.models.module.export import export_step

if TYPE_CHECKING:
    from BeatNet.model import BDA

RATE: Final = 22_050
HOP: Final = 441
WINDOW: Final = 1411
BANDS_PER_OCTAVE: Final = 24
FEATURES, HIDDEN, LAYERS = 272, 150, 2


class Step(nn.Module):
    """The package's network for one frame of each stream, [rows, 272], with the LSTM's state handed in and out."""

    def __init__(self, network: BDA) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Beat, downbeat or neither, [rows, 3]."""
        network = self.network
        rows = functional.max_pool1d(functional.relu(network.conv1(x.unsqueeze(1))), 2).flatten(1)
        before = tuple(state[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
        y, (hidden, cell) = network.lstm(network.linear0(rows).unsqueeze(1), before)
        return torch.softmax(network.linear(y[:, 0]), 1), {
            "hidden": hidden.transpose(0, 1),
            "cell": cell.transpose(0, 1),
        }


def make(folder: Path) -> Model:
    """The package's module with its weights, exported as a step."""
    state = {name: torch.zeros(1, LAYERS, HIDDEN) for name in ("hidden", "cell")}
    step = Step(_network())
    return export_step(
        step, torch.zeros(1, FEATURES), state, folder, outputs=["beat", "downbeat", "none"], overwrite=True
    )


def sound() -> F32:
    """Ten seconds of a bass drum at 120 beats a minute, 22,050 samples a second."""
    both = read_sound(shipped("BeatNet", "BeatNet/test_data/808kick120bpm.mp3"))
    mono: F32 = both.mean(axis=1)
    return mono[::2]  # from 44,100; a bass drum has next to nothing above 11 kHz


def frames(sound: F32) -> F32:
    """Logarithmic spectra by bands of a quarter tone, and how much each band has risen, [frames, 272].

    The package computes them with madmom, whose definitions these are.
    """
    padded = np.pad(sound, (WINDOW // 2, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: len(sound) : HOP] * np.hanning(WINDOW)
    spectra = np.abs(np.fft.rfft(windows)[:, : WINDOW // 2])
    bands = np.log10(spectra @ _filters() + 1)
    risen = np.maximum(np.diff(bands, axis=0, prepend=bands[:1]), 0)
    return np.hstack([bands, risen]).astype(np.float32)


@cache
def _filters() -> npt.NDArray[np.float64]:
    """Triangles that overlap, of area 1, [bins, bands]."""
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)[: WINDOW // 2]
    centres = 440 * 2 ** (np.arange(-200, 200) / BANDS_PER_OCTAVE)
    centres = centres[(centres >= 30) & (centres <= 17_000)]
    nearest = np.unique(np.abs(bins[:, np.newaxis] - centres).argmin(axis=0))
    triangles = [
        np.interp(np.arange(len(bins)), corners, (0, 1, 0))
        for corners in zip(nearest, nearest[1:], nearest[2:], strict=False)
    ]
    return np.stack([triangle / triangle.sum() for triangle in triangles], axis=1)


def own(sound: F32) -> F32:
    """The package's module, for the whole sound at once."""
    network = _network()
    with torch.no_grad():
        logits = network(torch.from_numpy(frames(sound))[np.newaxis])[0]
        probabilities: F32 = network.final_pred(logits).numpy().T
    return probabilities


def _network() -> BDA:
    from BeatNet.model import BDA

    network = BDA(FEATURES, HIDDEN, LAYERS, "cpu")
    weights = shipped("BeatNet", "BeatNet/models/model_1_weights.pt")
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return network.eval()


BEATNET: Final = Example(make=make, sound=sound, frames=frames, finish=lambda y: y, own=own, hop=HOP)
