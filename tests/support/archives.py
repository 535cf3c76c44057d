"""Steps saved by torch.export, and archives made of them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from typer.testing import CliRunner

from instep.cli import app
from tests.support.steps import FEATURES

MODEL: Final = "net/models/model.json"
WEIGHTS: Final = "net/data/weights/model_weights_config.json"
CONSTANTS: Final = "net/data/constants/model_constants_config.json"
SAMPLES: Final = "net/data/sample_inputs/model.pt"


class CellWithHead(nn.Module):
    """A cell of torch and a head."""

    def __init__(self, cell: type[nn.GRUCell] | type[nn.LSTMCell]) -> None:
        super().__init__()
        self.cell, self.head = cell(FEATURES, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        if isinstance(state, dict):
            h, c = self.cell(x, (state["h"], state["c"]))
            return self.head(h), {"h": h, "c": c}
        h = self.cell(x, state)
        return self.head(h), h


class Odds(nn.Module):
    """Arguments by keyword, numbers of rows, constants, infinities, and tensors that share their bytes."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.drop = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2), nn.Dropout(0.5)
        self.layer.bias = nn.Parameter(self.layer.weight[1])  # a part of the same bytes
        self.again = self.layer
        self.register_buffer("mask", torch.tensor([True, False, False, True, False]), persistent=False)
        self.offset = torch.arange(FEATURES).double()

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Any:
        before, count = state
        wide = torch.cat([torch.zeros(x.shape[0] * 2, FEATURES)[: x.shape[0]], self.drop(x)], dim=1)[:, FEATURES:]
        seen = self.again(self.layer(wide)).clamp(max=0.25) + self.offset.float()
        seen = seen.masked_fill(self.mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
        place = torch.full_like(count, 2).remainder(FEATURES).unsqueeze(1)
        y = {"loud": seen.amax(1), "both": self.other(torch.einsum("bi,bi->bi", seen, before)), "c": count.float()}
        return y, (torch.where(x > 0, seen, before).scatter(1, place, 1.0), count + 1)


def zeros(state: Any) -> Any:
    """A state of the same form; every stream of an imported step begins with it."""
    if isinstance(state, dict):
        return {name: torch.zeros_like(leaf) for name, leaf in state.items()}
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else type(state)(map(torch.zeros_like, state))


def dynamic(value: Any) -> Any:
    """Dynamic shapes for torch.export: the first size of each tensor."""
    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim("B", max=64)}
    if isinstance(value, dict):
        return {name: dynamic(each) for name, each in value.items()}
    return type(value)(map(dynamic, value))


def save(step: nn.Module, *args: Any, **shapes: Any) -> None:
    """Export a step as a user does, to the file net.pt2."""
    torch.export.save(torch.export.export(step, args, dynamic_shapes=dynamic(args), **shapes), "net.pt2")


def save_cell() -> None:
    """Export a GRU cell with a head to net.pt2."""
    if not _CELL:  # once for each process that runs tests
        save(CellWithHead(nn.GRUCell), torch.randn(3, FEATURES), torch.zeros(3, 32))
        _CELL.append(Path("net.pt2").read_bytes())
    Path("net.pt2").write_bytes(_CELL[0])


_CELL: Final[list[bytes]] = []


def imported(*options: str) -> tuple[int, str]:
    """The exit status of the command and what it says, in one line."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["model", "import", "net.pt2", *options])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


Members: TypeAlias = dict[str, bytes]


def members() -> Members:
    """Those of net.pt2."""
    with zipfile.ZipFile("net.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(changed: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile("net.pt2", "w") as archive:
        for name, content in changed.items():
            archive.writestr(name, content)
