"""`instep demo seed`: the first experiment, and the same once more over ZeroMQ.

A GRU over whole sequences, then one timestep at a time with the state carried, then served: three tables, equal. In
instep's own arithmetic they are equal bit for bit.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.console import Console
from torch import nn

from instep.demo.child_server import ChildFailed, ChildServer
from instep.demo.show import say
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.numerics import prepare
from instep.models.stepping import step_frames
from instep_client import Client, InstepError

EQUAL: Final = 0
DIFFERENT: Final = 1

BATCH_SIZE: Final = 2
INPUT_SIZE: Final = 3
NUM_HIDDENS: Final = 4
X: Final = (
    ((1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4), (5, 5, 5)),
    ((5, 5, 5), (4, 4, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
)


class SimpleGRU(nn.Module):
    """The experiment's module: frames [batch, steps, features] and states [layers, batch, hidden] in, the same out."""

    def __init__(self, input_size: int, num_hiddens: int, num_layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.GRU(input_size, num_hiddens, num_layers, batch_first=True)

    def forward(self, x: torch.Tensor, hidden_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [batch, steps, hidden] and the states after the last step."""
        output, state = self.rnn(x, hidden_state)
        return output, state


def init_weights(module: nn.Module) -> None:
    """The experiment's initialisation: every bias 0, every weight 0.5."""
    for name, parameter in module.named_parameters():
        nn.init.constant_(parameter, 0.0 if "bias" in name else 0.5)


@dataclass(frozen=True, eq=False)
class ThreeOutputs:
    """The same outputs [steps, batch, hidden], computed in three ways."""

    whole: torch.Tensor
    stepped: torch.Tensor
    served: torch.Tensor

    @property
    def equal_as_printed(self) -> bool:
        """Whether they show the same numbers with 4 decimals."""
        shown = [
            [f"{value:.4f}" for value in each.flatten().tolist()] for each in (self.whole, self.stepped, self.served)
        ]
        return shown[0] == shown[1] == shown[2]

    @property
    def equal_bits(self) -> bool:
        """Whether they are the same bits."""
        whole, stepped, served = (each.numpy().tobytes() for each in (self.whole, self.stepped, self.served))
        return whole == stepped == served

    @property
    def distance(self) -> float:
        """How far values of the first two are from those served, at most."""
        return max(float((each - self.served).abs().max()) for each in (self.whole, self.stepped))


def run(console: Console) -> int:
    """Show the three tables, and whether they are equal.

    Returns:
        `EQUAL` when they are equal as printed and, in instep's arithmetic, bit for bit; else `DIFFERENT`.
    """
    prepare()
    gru = SimpleGRU(INPUT_SIZE, NUM_HIDDENS).eval()
    init_weights(gru)
    x = torch.tensor(X, dtype=torch.float32)
    say(console, f"{gru}\nall weights 0.5, all biases 0\nInput data shape {x.shape}")
    say(console, "\nThe whole sequence in one call of nn.GRU", "bold")
    whole = whole_sequence(gru, x)
    say(console, str(whole))
    say(console, "\nOne timestep at a time, the state carried", "bold")
    stepped = one_timestep_at_a_time(gru, x)
    _say_timesteps(console, stepped)
    say(console, "\nServed over ZeroMQ, one frame at a time, the state kept by the engine", "bold")
    try:
        model, served = _serve(gru, x)
    except (ChildFailed, InstepError) as error:
        say(console, str(error), "bold red")
        return DIFFERENT
    _say_timesteps(console, served)
    equal, sentence = verdict(
        ThreeOutputs(whole, stepped, served), ThreeOutputs(*in_own_arithmetic(PortableNetwork(model), x), served)
    )
    say(console, "\nwhole sequence, one timestep at a time, served:")
    say(console, sentence, "bold green" if equal else "bold red")
    return EQUAL if equal else DIFFERENT


@torch.no_grad()
def whole_sequence(gru: SimpleGRU, x: torch.Tensor) -> torch.Tensor:
    """Outputs [steps, batch, hidden] of one call for x [batch, steps, features]."""
    output: torch.Tensor = gru(x, torch.zeros(1, len(x), gru.rnn.hidden_size))[0]
    return output.permute(1, 0, 2)


@torch.no_grad()
def one_timestep_at_a_time(gru: SimpleGRU, x: torch.Tensor) -> torch.Tensor:
    """The same from a call for each timestep, where the state of one becomes the initial state of the next."""
    state = torch.zeros(1, len(x), gru.rnn.hidden_size)
    outputs = []
    for timestep in range(x.shape[1]):
        output, state = gru(x[:, timestep].unsqueeze(1), state)
        outputs.append(output.squeeze(1))
    return torch.stack(outputs)


def in_own_arithmetic(network: PortableNetwork, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in `portable-1`: whole sequences by the definition, and one timestep at a time by the compiled step."""
    frames, states = x.transpose(0, 1).contiguous().numpy(), network.state.initial(len(x))
    timesteps, rows, _ = frames.shape
    whole, _ = network.definition().run(frames, network.state.unpack(states), np.full(timesteps, rows))
    stepped, _ = step_frames(network, frames, states)
    return torch.from_numpy(whole), torch.from_numpy(stepped)


def _serve(gru: SimpleGRU, x: torch.Tensor) -> tuple[Model, torch.Tensor]:
    """The model, and the same from an engine that serves it: a stream for each row, a message for each timestep."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), gru.rnn, name="seed")
        with ChildServer(Path(folder), ["--device", "cpu"]) as server, Client(server.endpoint, "seed") as client:
            streams = client.open_group([f"row-{row}" for row in range(len(x))])
            outputs = [streams.step(frames) for frames in x.transpose(0, 1).numpy()]
            streams.close()
            return model, torch.from_numpy(np.stack(outputs))


def verdict(printed: ThreeOutputs, own: ThreeOutputs) -> tuple[bool, str]:
    """Whether the tables are as equal as they should be, and a sentence.

    The first two of `printed` were computed by torch, those of `own` in `portable-1`.
    """
    as_printed = "equal to 4 decimals, as printed" if printed.equal_as_printed else "NOT equal to 4 decimals"
    bits = "equal bit for bit" if own.equal_bits else f"NOT equal bit for bit, up to {own.distance:.1e} apart"
    sentence = f"{as_printed};\nin portable-1: {bits};\ntorch's nn.GRU is up to {printed.distance:.1e} away from it"
    return printed.equal_as_printed and own.equal_bits, sentence


def _say_timesteps(console: Console, outputs: torch.Tensor) -> None:
    for output in outputs:
        say(console, str(output.unsqueeze(1)))
