"""Stepping rows of states with a bound step from the host: for certification, replay and tests.

The server's own path is in `runtime`.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from instep.core.typing import F32, U8
from instep.models.base import BoundStep, StateSpec


def put(tensor: torch.Tensor, values: npt.NDArray[Any]) -> None:
    """Copy an array into a tensor of its shape, wherever that is."""
    if tensor.device.type == "cpu":
        tensor.numpy()[...] = values
    else:
        tensor.copy_(torch.tensor(values))


def load_state(step: BoundStep, spec: StateSpec, rows: U8) -> None:
    """Fill `step.state` from rows of bytes [B, row_bytes], one for each row of the batch."""
    for name, values in spec.unpack(rows).items():
        put(step.state[name], values)


def read_state(step: BoundStep, spec: StateSpec, rows: slice = slice(None)) -> U8:
    """`step.new_state`, of some rows, as rows of bytes [B, row_bytes], a copy."""
    return spec.pack({name: tensor[rows].cpu().numpy() for name, tensor in step.new_state.items()})


def keep_state(step: BoundStep) -> None:
    """Make the state after the frame the one before the next frame."""
    for name, after in step.new_state.items():
        if after is not step.state[name]:
            step.state[name].copy_(after)


def step_rows(step: BoundStep, spec: StateSpec, x: F32, rows: U8, outputs: int) -> tuple[F32, U8]:
    """Step a whole batch: frames [B, features] and rows of states to outputs [B, outputs] and rows, as copies."""
    put(step.x[:, : x.shape[1]], x)
    load_state(step, spec, rows)
    step.run()
    return step.y[:, :outputs].cpu().numpy().copy(), read_state(step, spec)
