"""Sequences, one frame after another: through the step of a network, or through that of a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from instep.core.typing import F32, I64, U8
from instep.models.base import Floats, RecurrentModel


def step_frames(network: RecurrentModel, x: F32, rows: U8) -> tuple[F32, U8]:
    """Step frames [T, R, features]: outputs [T, R, outputs] and rows of states after them."""
    y = np.empty((*x.shape[:2], network.description.outputs), np.float32)
    for frame, answers in zip(x, y, strict=True):
        answers[...], rows = network.step(frame, rows)
    return y, rows


def scan(
    step: Callable[[Floats, dict[str, Any]], tuple[Floats, Mapping[str, Any]]],
    x: Floats,
    state: Mapping[str, Any],
    active: I64,
    outputs: int,
) -> tuple[Floats, dict[str, Any]]:
    """Run sequences of different lengths by one step after another; see `Reference.run`.

    Args:
        step: gives outputs [R, outputs] and leaves after frames [R, features] and leaves before them, which are copies.
        x: frames [T, R, features].
        state: by leaf, [R, *shape].
        active: [T], descending.
        outputs: values per frame.
    """
    y, after = np.zeros((*x.shape[:2], outputs), x.dtype), {name: np.array(leaf) for name, leaf in state.items()}
    for timestep, count in enumerate(active.tolist()):
        before = {name: leaf[:count].copy() for name, leaf in after.items()}
        y[timestep, :count], leaves = step(x[timestep, :count], before)
        for name, leaf in leaves.items():
            after[name][:count] = leaf
    return y, after
