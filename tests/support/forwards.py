"""A module whose forward a test gives, and what is served of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from instep.models.model import Model
from instep.models.registry import build

Forward = Callable[..., Any]


class Net(nn.Module):
    """Layers as people name them; each test gives the forward that uses some of them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5))
        self.gru = nn.GRU(16, 10, num_layers=2, batch_first=True, dropout=0.2)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(10, 7)
        self.last = nn.Linear(7, 3, bias=False)
        self.layer_norm = nn.LayerNorm(10)
        self.rms_norm = nn.RMSNorm(10)
        self.leaky = nn.LeakyReLU(0.2)
        self.state = nn.Parameter(torch.ones(2, 1, 10))
        with torch.no_grad():
            for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                assert tensor is not None
                tensor.uniform_(-1, 1)
            assert self.norm.running_var is not None
            self.norm.running_var.uniform_(0.1, 3)
        self._forward = forward

    def forward(self, x: torch.Tensor, *others: Any) -> Any:
        return self._forward(self, x, *others)


def served(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Outputs [B, T, outputs] for frames [B, T, features]."""
    network = build(model, torch.device("cpu"))
    frames = np.ascontiguousarray(x.transpose(0, 1).numpy())
    whole = network.sequence(frames, network.state.initial(frames.shape[1]))
    assert whole is not None
    return torch.from_numpy(whole[0]).transpose(0, 1)


def plain(net: Any, x: torch.Tensor) -> Any:
    return net.last(torch.tanh(net.head(net.gru(net.encoder(x))[0])))
