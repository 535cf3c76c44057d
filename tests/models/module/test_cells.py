"""Cells of exported steps: by hand they have the bits of torch's own, wherever their states come from and end up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from instep.models import export_step
from instep.models.module.cells import BoundCell
from instep.models.module.network import ModuleNetwork
from instep.models.recurrent.cell import BY_HAND
from instep.models.stepping import keep_state, load_state
from tests.support.running import CPU

FEATURES, ROWS = 5, 64
LEAVES = {"gru": 32, "h": 64, "c": 64, "rnn": 32, "one": 32, "other": 32, "last": 32}
Tensors = dict[str, torch.Tensor]


class Cells(nn.Module):
    """All kinds of cells: states that only a cell uses, that others use as well, and that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(FEATURES, 32), nn.LSTMCell(32, 64)
        self.rnn, self.relu = nn.RNNCell(64, 32, bias=False), nn.RNNCell(32, 32, nonlinearity="relu")
        self.one, self.other = nn.GRUCell(32, 32), nn.GRUCell(32, 32, bias=False)

    def forward(self, x: torch.Tensor, state: Tensors) -> tuple[torch.Tensor, Tensors]:
        gru = self.gru(x, state["gru"])
        h, c = self.lstm(gru, (state["h"], state["c"]))
        rnn = self.rnn(h, state["rnn"])
        moved = rnn - state["rnn"]
        one = self.one(moved, state["one"])
        other = self.other(one, state["other"])
        twice = self.relu(self.relu(rnn, moved), state["last"])  # its own state, and not what is kept
        new = {"gru": gru, "h": h, "c": c, "rnn": rnn, "one": other, "other": one, "last": twice / 2}
        return twice, new


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cells, ModuleNetwork]:
    torch.manual_seed(5)
    module = Cells()
    state = {name: torch.zeros(1, width) for name, width in LEAVES.items()}
    model = export_step(module, torch.zeros(1, FEATURES), state, tmp_path_factory.mktemp("cells") / "m")
    return module.eval(), ModuleNetwork(model, CPU)


@pytest.mark.parametrize("kernel", ["graph", *BY_HAND])
def test_every_way_to_step_them_computes_what_the_module_does(
    cells: tuple[Cells, ModuleNetwork], kernel: Any, rng: np.random.Generator
) -> None:
    module, network = cells
    network.select_step([ROWS], 64)
    has_the_bits = kernel in ("graph", network.kernel)
    network.kernel = kernel
    step = network.bind(ROWS)
    load_state(step, network.state, network.state.initial(ROWS))
    state = {name: torch.zeros(ROWS, width) for name, width in LEAVES.items()}
    with torch.inference_mode():
        for x in torch.from_numpy(rng.standard_normal((9, ROWS, FEATURES)).astype(np.float32)):
            step.x.copy_(x)
            step.run()
            y, state = module(x, state)
            for found, expected in zip([step.y, *step.new_state.values()], [y, *state.values()], strict=True):
                if has_the_bits:
                    assert torch.equal(found, expected)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            keep_state(step)


@pytest.mark.parametrize("spoiled", [(), ("fused",), BY_HAND])
def test_they_are_stepped_by_hand_only_where_that_gives_the_bits_of_torch(
    cells: tuple[Cells, ModuleNetwork], spoiled: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = cells
    network.select_step((32, 96), 64)
    if network.kernel != "fused":
        pytest.skip("products are cut in other parts on this machine")
    expected = next((kernel for kernel in BY_HAND if kernel not in spoiled), "graph")
    made, run, flip = BoundCell.__init__, BoundCell.run, torch.tensor(1, dtype=torch.int32)
    by_hand: dict[BoundCell, str] = {}

    def init(cell: BoundCell, call: Any, *, adds_biases: bool) -> None:
        by_hand[cell] = "fused" if adds_biases else "addmm"
        made(cell, call, adds_biases=adds_biases)

    def torchs_or_spoiled(cell: BoundCell, x: torch.Tensor, states: Any) -> Any:
        found = run(cell, x, states)
        if by_hand[cell] in spoiled and len(x) == 96:
            cell.leaves[0][-1, -1:].view(torch.int32).bitwise_xor_(flip)
        return found

    monkeypatch.setattr(BoundCell, "__init__", init)
    monkeypatch.setattr(BoundCell, "run", torchs_or_spoiled)
    network.select_step((32, 96), 64)
    assert network.kernel == expected
    network.select_quickest()
    assert network.kernel == "fused"


class Others(nn.Module):
    """Cells that are left to torch: in float64, narrower than vectors, with weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.normed = nn.GRUCell(5, 16).double(), nn.LSTMCell(16, 7), nn.GRUCell(7, 16)

    def forward(self, x: torch.Tensor, state: Tensors) -> tuple[torch.Tensor, Tensors]:
        double = self.wide(x.double(), state["double"])
        h, c = self.narrow(double.float(), (state["h"], state["c"]))
        weight = self.normed.weight_ih / self.normed.weight_ih.norm(dim=1, keepdim=True)
        normed = torch.gru_cell(h, state["normed"], weight, self.normed.weight_hh, None, None)
        return normed, {"double": double, "h": h, "c": c, "normed": normed}


def test_other_cells_are_left_to_torch(tmp_path: Path) -> None:
    state = {"double": torch.zeros(1, 16).double(), "h": torch.zeros(1, 7), "c": torch.zeros(1, 7)}
    model = export_step(Others(), torch.zeros(1, FEATURES), {**state, "normed": torch.zeros(1, 16)}, tmp_path / "m")
    network = ModuleNetwork(model, CPU)
    network.select_quickest()
    assert network.kernel == "graph"
