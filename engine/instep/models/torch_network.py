"""A network in torch's operators: it serves on a GPU, and CPU results are compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from instep.core.typing import F32, U8
from instep.models.base import Reference, StateSpec
from instep.models.errors import ModelError
from instep.models.model import Model

Leaves: TypeAlias = Mapping[str, torch.Tensor]
"""Leaves by name, [R, *shape]."""


class Forward(Protocol):
    """The torch module of a kind."""

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute outputs [T, R, outputs] and new leaves from frames [T, R, features] and leaves."""


class TorchNetwork:
    """A `RecurrentModel` without a promise of bits.

    Args:
        model: its name, description, state and weights.
        device: where `forward` computes.
        forward: the module.
    """

    arithmetic = "torch"

    def __init__(self, model: Model, device: torch.device, forward: Forward) -> None:
        self.model = model
        self.description, self.fingerprint, self.device = model.description, model.fingerprint, device
        self.state: StateSpec = model.state
        self.forward = forward

    def step(self, x: F32, states: U8) -> tuple[F32, U8]:
        """See `RecurrentModel.step`."""
        y, after = self.sequence(x[None], states)
        return y[0], after

    @torch.inference_mode()
    def sequence(self, x: F32, states: U8) -> tuple[F32, U8]:
        """See `RecurrentModel.sequence`."""
        leaves = {
            name: torch.from_numpy(leaf.copy()).to(self.device) for name, leaf in self.state.unpack(states).items()
        }
        y, after = self.forward(torch.from_numpy(np.ascontiguousarray(x)).to(self.device), leaves)
        outputs: F32 = np.ascontiguousarray(y.cpu().numpy(), np.float32)
        return outputs, self.state.pack({name: after[name].cpu().numpy() for name in leaves})

    def bind(self, rows: int) -> BoundStep:
        """The step of a batch of `rows`, to be captured as a CUDA graph."""
        return BoundStep(self, rows)

    def definition(self) -> Reference | None:
        """Return None: torch's operators promise no bits."""
        return None

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The reference of the model's kind."""
        from instep.models.registry import reference

        return reference(self.model, dtype)


class BoundStep:
    """The step of one batch size on fixed buffers: fill `x` and `state`, call `run`, read `y`.

    Attributes:
        x: frames, float32 [rows, features].
        state: by leaf, [rows, *shape]; `run` replaces it by the new state.
        y: outputs, float32 [rows, outputs].
    """

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, network: TorchNetwork, rows: int) -> None:
        description, device = network.description, network.device
        self.x = torch.zeros(rows, description.features, device=device)
        self.y = torch.zeros(rows, description.outputs, device=device)
        self.state = {
            leaf.name: torch.zeros(rows, *leaf.shape, dtype=getattr(torch, leaf.dtype.name), device=device)
            for leaf in network.state.leaves
        }
        self._forward = network.forward

    def run(self) -> None:
        """Step every row; on a GPU this only enqueues the work."""
        y, after = self._forward(self.x.unsqueeze(0), self.state)
        self.y.copy_(y[0])
        # A step may return a leaf as another one, which is overwritten here before it is read.
        held = {leaf.untyped_storage().data_ptr() for leaf in self.state.values()}
        results = {
            name: after[name].clone() if after[name].untyped_storage().data_ptr() in held else after[name]
            for name in self.state
        }
        for name, leaf in self.state.items():
            if results[name].shape != leaf.shape:
                raise ModelError(f"leaf {name} becomes {list(results[name].shape)}, and not {list(leaf.shape)}")
            leaf.copy_(results[name])
