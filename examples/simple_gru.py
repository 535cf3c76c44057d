"""The smallest network: a GRU over a whole sequence, and the same one timestep at a time through a server.

The module, its input and its sizes are those of the experiment that instep grew from: two sequences of five timesteps
with three features, and a hidden state of four.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.console import Console
from torch import nn

from examples.example import serving
from instep.core.typing import F32
from instep.models.handover.save import save_model
from instep.recording.database import remove_database
from instep.replay.command import run as verify
from instep_client import Client

X: Final = torch.tensor([[[t, t, t] for t in range(1, 6)], [[t, t, t] for t in range(5, 0, -1)]], dtype=torch.float32)
"""[2 sequences, 5 timesteps, 3 features]."""
HIDDEN: Final = 4
H_0: Final = torch.linspace(-1, 1, 2 * HIDDEN).reshape(1, 2, HIDDEN)
"""The initial state, [1 layer, 2 sequences, 4]."""


class SimpleGRU(nn.Module):
    """One GRU; its outputs are its hidden states."""

    def __init__(self, input_size: int, num_hiddens: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(input_size, num_hiddens, batch_first=True)

    def forward(self, x: torch.Tensor, hidden_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [sequences, timesteps, 4] and the final state [1, sequences, 4]."""
        output, state = self.rnn(x, hidden_state)
        return output, state


def random_weights() -> SimpleGRU:
    """The weights that torch draws."""
    torch.manual_seed(0)
    return SimpleGRU(X.shape[2], HIDDEN)


def constant_weights() -> SimpleGRU:
    """Weights of 0.5, and biases of 0."""
    gru = random_weights()
    for name, parameter in gru.named_parameters():
        nn.init.constant_(parameter, 0.0 if "bias" in name else 0.5)
    return gru


WEIGHTS: Final[dict[str, Callable[[], SimpleGRU]]] = {"random": random_weights, "constant": constant_weights}


def main(folder: Path, console: Console) -> int:
    """Run the experiment with both kinds of weights; return the verifier's exit status."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for title, make in WEIGHTS.items():
        gru = make()
        with torch.no_grad():
            output, state = gru(X, H_0)
        whole = np.concatenate([output.numpy(), state.numpy().transpose(1, 0, 2)], axis=1)
        console.print(f"[bold]{title} weights[/bold]")
        _show(whole, stream(gru, folder / title, recording_of(folder, title)), console)
    console.print(
        "Both are float32 and round after each operation, and torch adds in an order\n"
        "of its own, which depends on the processor. instep's order is always the\n"
        "same, so what it recorded can be computed again, bit for bit:\n"
    )
    return verify([recording_of(folder, title) for title in WEIGHTS], None, [], console)


def recording_of(folder: Path, title: str) -> Path:
    """The recording of the streams with these weights."""
    return folder / f"{title}.instep"


def stream(gru: SimpleGRU, folder: Path, recording: Path) -> F32:
    """Send the sequences to a server one timestep at a time; outputs and then the final state, [2, 5 + 1, 4]."""
    save_model(folder, gru.rnn, overwrite=True)
    remove_database(recording)
    with serving(folder, recording) as server, Client(server.endpoint) as client:
        group = client.open_group(["sequence-1", "sequence-2"], H_0.transpose(0, 1).numpy())
        outputs = [group.step(X[:, timestep].numpy()) for timestep in range(X.shape[1])]
        return np.stack([*outputs, group.close()["h"][:, 0]], axis=1)


def _show(whole: F32, streamed: F32, console: Console) -> None:
    """Print both side by side, timestep by timestep, and the digits to which they are equal."""
    console.print(f"{'':13}{'the whole sequence':31}one timestep at a time")
    for timestep in range(whole.shape[1]):
        title = f"timestep {timestep + 1}" if timestep + 1 < whole.shape[1] else "final state"
        for left, right in zip(whole[:, timestep], streamed[:, timestep], strict=True):
            console.print(f"{title:13}{_row(left):31}{_row(right)}", markup=False, highlight=False)
            title = ""
    difference = float(np.abs(whole - streamed).max())
    digits = f"{int(-np.log10(difference))} decimal places" if difference else "the last bit"
    console.print(f"\nequal to {digits}; the largest difference is {difference:.1e}\n")


def _row(values: F32) -> str:
    return "[" + " ".join(f"{value:6.3f}" for value in values) + "]"
