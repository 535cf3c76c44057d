"""Trains the demo's model: it says at every frame who of nine speakers is talking.

    python -m examples.speakers --output FOLDER

A GRU(12 → 64) and a linear head learn from every frame of the training recordings, standardised and with noise added.
The standardisation is then folded into the GRU's input weights, so the served model takes frames as recorded. Numbers
of epochs, rate and noise were chosen by cross-validation over the training recordings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from instep.demo.producers import SPEAKERS, Utterances, load_utterances
from instep.models.base import step_frames
from instep.models.errors import ModelError
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.numerics import prepare
from instep.models.registry import build

TRAIN: Final = Path(__file__).parent / "data" / "japanese_vowels_train.npz"
FEATURES: Final = 12
HIDDEN_SIZE: Final = 64
EPOCHS: Final = 60
BATCH_UTTERANCES: Final = 30
LEARNING_RATE: Final = 0.01
NOISE: Final = 0.6
"""Standard deviation of the noise added to standardised frames."""


def train(
    utterances: Utterances, seed: int = 0, epochs: int = EPOCHS, progress: Callable[[int, float], None] | None = None
) -> tuple[nn.GRU, nn.Linear]:
    """A GRU and its head for frames as recorded; the same for the same seed on the same machine.

    `progress` hears after each epoch its number, from 1, and the mean loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gru, head = nn.GRU(FEATURES, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, SPEAKERS)
        x, lengths = _padded(utterances)
        recorded = torch.from_numpy(np.concatenate(utterances.frames))
        mean, deviation = recorded.mean(0), recorded.std(0)
        x = (x - mean) / deviation
        spoken = torch.arange(len(x))[:, None] < lengths
        speaker = torch.from_numpy(utterances.speakers).long().expand(len(x), -1)
        count = len(lengths)
        steps = epochs * -(-count // BATCH_UTTERANCES)
        optimizer = torch.optim.AdamW([*gru.parameters(), *head.parameters()], LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in torch.split(torch.randperm(count), BATCH_UTTERANCES):
                noisy = x[:, batch] + NOISE * torch.randn(len(x), len(batch), FEATURES)
                scores: torch.Tensor = head(gru(noisy)[0])
                heard = spoken[:, batch]
                loss = nn.functional.cross_entropy(scores[heard], speaker[:, batch][heard])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            if progress is not None:
                progress(epoch, sum(losses) / len(losses))
        _fold(gru, mean, deviation)
    return gru, head


def accuracy(model: Model, utterances: Utterances) -> tuple[float, float]:
    """Shares of right decisions of the model as it is served: at the last frames, and over all frames."""
    network = build(model, torch.device("cpu"))
    x, lengths = _padded(utterances)
    frames, count, _ = x.shape
    y, _ = step_frames(network, x.numpy(), network.state.initial(count))
    right = torch.from_numpy(y.argmax(2)) == torch.from_numpy(utterances.speakers)
    spoken = torch.arange(frames)[:, None] < lengths
    return right[lengths - 1, torch.arange(count)].double().mean().item(), right[spoken].double().mean().item()


def main(arguments: Sequence[str] | None = None, epochs: int = EPOCHS) -> int:
    """Train, save, and say how well it does; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.speakers", description="Train the demo's model.")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where to write the model, or replace it"
    )
    out: Path = parser.parse_args(arguments).output
    prepare()

    def progress(epoch: int, loss: float) -> None:
        if epoch % 10 == 0:
            sys.stdout.write(f"epoch {epoch} of {epochs}: loss {loss:.3f}\n")

    gru, head = train(load_utterances(TRAIN), epochs=epochs, progress=progress)
    try:
        model = save_model(out, gru, after=[(head, "none")], name="speakers", overwrite=True)
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    last_frame, all_frames = accuracy(model, load_utterances())
    sys.stdout.write(
        f"{out}: test accuracy {last_frame:.4f} on the last frame, {all_frames:.4f} averaged over all frames\n"
    )
    return 0


def _padded(utterances: Utterances) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [longest, utterances, 12], zeros after each one's end, and the lengths."""
    lengths = [len(frames) for frames in utterances.frames]
    x = torch.zeros(max(lengths), len(lengths), FEATURES)
    for column, frames in enumerate(utterances.frames):
        x[: len(frames), column] = torch.from_numpy(frames)
    return x, torch.tensor(lengths)


@torch.no_grad()
def _fold(gru: nn.GRU, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Make the GRU take x where it took (x - mean) / deviation."""
    weight = gru.get_parameter("weight_ih_l0").div_(deviation)
    gru.get_parameter("bias_ih_l0").sub_(weight @ mean)


if __name__ == "__main__":
    sys.exit(main())
