"""Networks of other kinds than a GRU: the folders that are served, and torch's own modules to compare with."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.measurement import Bench
from benchmarks.reference import (
    BenchmarkModel,
    LeftOut,
    Network,
    TorchBatch,
    own_network,
    torch_layers,
)
from instep.core.typing import F32
from instep.models import export_step
from instep.models.folder import load_model, make_model, write_model
from instep.models.recurrent.description import LstmDescription, LstmLayers

FEATURES, HIDDEN = 40, 128


class GruStep(torch.nn.Module):
    """A GRU as users write it for `export_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.GRUCell(FEATURES, HIDDEN)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [rows, features] and states [rows, hidden] to outputs and states [rows, hidden]."""
        h = self.cell(x, h)
        return h, h


def lstm(bench: Bench) -> BenchmarkModel:
    """An LSTM of random weights, the same in every run."""
    description = LstmDescription(features=FEATURES, lstm=LstmLayers(hidden_size=HIDDEN))
    model = make_model(description, init="random", seed=1, name="benchmark")
    write_model(bench.folder / "lstm", model)
    module = torch.nn.LSTM(FEATURES, HIDDEN)
    module.load_state_dict({name.removeprefix("lstm."): tensor for name, tensor in model.weights.items()})
    return _model(bench.folder / "lstm", f"LSTM {FEATURES}→{HIDDEN}, float32", torch_layers(module.eval()))


def step_module(bench: Bench) -> BenchmarkModel:
    """A GRU of random weights, the same in every run, exported as a step module."""
    torch.manual_seed(1)
    step, folder = GruStep().eval(), bench.folder / "step-module"
    export_step(step, torch.zeros(1, FEATURES), torch.zeros(1, HIDDEN), folder)

    def call(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
        y, h = step(x, h)
        return y, (h,)

    def run(x: F32) -> None:
        raise LeftOut("a step module has no call for whole sequences to compare with")

    network = Network("the module", HIDDEN, lambda rows: TorchBatch(call, (torch.zeros(rows, HIDDEN),)), run)
    return _model(folder, f"GRU {FEATURES}→{HIDDEN} as a step module, float32", network)


def _model(folder: Path, words: str, network: Network) -> BenchmarkModel:
    model = load_model(folder)
    return BenchmarkModel(folder, words, FEATURES, model.state, network, own_network(model))
