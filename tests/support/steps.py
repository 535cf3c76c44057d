"""Step modules as users write them, and the models that are exported from them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import nn

from instep.core.typing import F32
from instep.models import export_step
from instep.models.model import Model

State: TypeAlias = dict[str, torch.Tensor]
FEATURES: Final = 5


class LayerNormGru(nn.Module):
    """A GRU cell with a layer norm over each half of its gates."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(FEATURES, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.norm_x, self.norm_h = nn.LayerNorm(3 * hidden), nn.LayerNorm(3 * hidden)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        h = state["h"]
        rx, zx, nx = self.norm_x(self.of_x(x)).chunk(3, 1)
        rh, zh, nh = self.norm_h(self.of_h(h)).chunk(3, 1)
        z, n = torch.sigmoid(zx + zh), torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        h = (1 - z) * n + z * h
        return self.head(h), {"h": h}


class CausalConvolution(nn.Module):
    """A convolution over the last frames, which are kept in a cache [C, K] and shifted in place of a copy."""

    def __init__(self, channels: int = 7, kernel: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(FEATURES, channels)
        self.convolution = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.head = nn.Linear(channels, 2)

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor]]:
        (before,) = state
        cache = before.clone()
        cache[:, :, :-1] = before[:, :, 1:]
        cache[:, :, -1] = self.mix(x)
        y = nn.functional.silu(self.convolution(cache).squeeze(2))
        return {"level": y.mean(1), "class": torch.softmax(self.head(y), 1)}, (cache,)


class MinGru(nn.Module):
    """A gate and a candidate that see the frame only; a projection of other width on both sides."""

    def __init__(self, hidden: int = 33) -> None:
        super().__init__()
        self.gate, self.new, self.head = (
            nn.Linear(FEATURES, hidden),
            nn.Linear(FEATURES, hidden),
            nn.Linear(hidden, 4),
        )

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.sigmoid(self.gate(x))
        state = torch.lerp(state, self.new(x), z)
        return nn.functional.gelu(self.head(state)), state


class SelectiveStateSpace(nn.Module):
    """One step of a Mamba block: the input decides how much each of its states keeps."""

    def __init__(self, inner: int = 6, size: int = 4) -> None:
        super().__init__()
        self.inner, self.size = inner, size
        self.split, self.select = nn.Linear(FEATURES, 2 * inner), nn.Linear(inner, 1 + 2 * size)
        self.delta, self.head = nn.Linear(1, inner), nn.Linear(inner, FEATURES)
        self.log_a = nn.Parameter(torch.log(torch.arange(1.0, size + 1).repeat(inner, 1)))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: torch.Tensor, state: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        u, gate = self.split(x).chunk(2, dim=1)
        step, b, c = torch.split(self.select(nn.functional.silu(u)), [1, self.size, self.size], dim=1)
        delta = nn.functional.softplus(self.delta(step)).unsqueeze(2)
        kept = torch.exp(delta * -torch.exp(self.log_a)) * state[0] + delta * b.unsqueeze(1) * u.unsqueeze(2)
        y = torch.einsum("bis,bs->bi", kept, c) + self.skip * u
        return self.head(y * nn.functional.silu(gate)) + x, [kept]


class Counting(nn.Module):
    """A ring of the last values whose place is an int64 leaf, a flag, and a sum in float64."""

    scale: torch.Tensor

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("scale", torch.linspace(0.5, 2, size))

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        place = (state["count"] % self.size).unsqueeze(1)
        ring = state["ring"].scatter(1, place, x[:, :1])
        loud = state["loud"] | (x.abs().amax(1) > 2.5)
        total = state["total"] + x.sum(1).double()
        y = torch.stack([(ring * self.scale).sum(1), total.float(), loud.float(), state["count"].float()], 1)
        y = torch.where(loud.unsqueeze(1), y, -y)
        return y, {"count": state["count"] + 1, "ring": ring, "loud": loud, "total": total}


class NarrowElu(nn.Module):
    """A layer so narrow that `elu` ends its vectors within a row, and a state of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES + 1, 3)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.elu(self.layer(torch.cat([x, state], 1)))
        return y, y[:, :1]


STEPS: Final[dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]] = {
    "layer_norm_gru": (LayerNormGru, lambda: {"h": torch.zeros(1, 24)}),
    "causal_convolution": (CausalConvolution, lambda: (torch.zeros(1, 7, 4),)),
    "min_gru": (MinGru, lambda: torch.full((1, 33), 0.5)),
    "selective_state_space": (SelectiveStateSpace, lambda: [torch.zeros(1, 6, 4)]),
    "counting": (
        Counting,
        lambda: {
            "count": torch.full((1,), 7),
            "ring": torch.full((1, 3), -1.0),
            "loud": torch.zeros(1, dtype=torch.bool),
            "total": torch.zeros(1, dtype=torch.float64),
        },
    ),
    "narrow_elu": (NarrowElu, lambda: torch.zeros(1, 1)),
}
"""By name, a step and what a stream begins with."""


def step_of(name: str) -> nn.Module:
    """The module, with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return STEPS[name][0]().eval()


def example(name: str, rows: int = 1) -> Any:
    """The state before the first frame, of `rows` streams."""
    return repeated(STEPS[name][1](), rows)


def repeated(state: Any, rows: int) -> Any:
    """A state whose first row all rows have."""
    if isinstance(state, torch.Tensor):
        return state[:1].repeat(rows, *[1] * (state.dim() - 1))
    if isinstance(state, dict):
        return {name: repeated(leaf, rows) for name, leaf in state.items()}
    return type(state)(repeated(leaf, rows) for leaf in state)


def leaves(state: Any) -> list[torch.Tensor]:
    """In order."""
    return [state] if isinstance(state, torch.Tensor) else list(state.values() if isinstance(state, dict) else state)


@cache
def exported_folder(name: str) -> Path:
    """The folder that the step was exported to, by whichever process of a run of the tests asks first."""
    folder = _folder_of_run() / name
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            begun = folder.parent / "begun" / name  # the model has its folder's name
            export_step(step_of(name), torch.zeros(1, FEATURES), example(name), begun, initial_state="example")
            begun.rename(folder)  # only now is it whole
    return folder


@cache
def _folder_of_run() -> Path:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return Path(tempfile.mkdtemp(prefix="instep-steps-"))
    folder = Path(tempfile.gettempdir()) / f"instep-steps-{run}"
    folder.mkdir(exist_ok=True)
    return folder


@cache
def exported(name: str) -> Model:
    """What that folder holds."""
    from instep.models.folder import load_model

    return load_model(exported_folder(name))


@torch.inference_mode()
def eager(name: str, x: F32, rows: int, state: Any = None) -> tuple[F32, list[torch.Tensor]]:
    """The truth: the module itself, stepped over one stream's frames [T, features] in equal rows.

    Returns:
        Outputs [T, outputs] and the leaves [*shape] after them.
    """
    torch.set_num_threads(1)
    module, state = step_of(name), example(name, rows) if state is None else state
    outputs = []
    for frame in torch.from_numpy(x.copy()):
        y, state = module(frame.repeat(rows, 1), state)
        parts = list(y.values()) if isinstance(y, dict) else [y]
        outputs.append(torch.cat([part[:1].reshape(1, -1) for part in parts], 1)[0])
    return torch.stack(outputs).numpy().astype(np.float32), [leaf[0] for leaf in leaves(state)]
