"""Recorded frames through the compiled step, frame by frame."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I64, U8
from instep.models.base import RecurrentModel


def replay_stepped(network: RecurrentModel, x: F32, states: U8, active: I64, after: U8 | None = None) -> tuple[F32, U8]:
    """Step sequences side by side, the longest first.

    Args:
        network: the model.
        x: frames [T, R, features].
        states: before them, rows of bytes [R, row_bytes]; not changed.
        active: [T], descending: how many rows have a frame at each timestep.
        after: uint8 [T, R, row_bytes], filled with the state after each frame; None where nobody asks.

    Returns:
        Outputs [T, R, outputs], meaningless where a row has no frame, and the states after each row's last frame.
    """
    y = np.zeros((*x.shape[:2], network.description.outputs), np.float32)
    states = states.copy()
    for timestep, count in enumerate(active.tolist()):
        y[timestep, :count], states[:count] = network.step(x[timestep, :count], states[:count])
        if after is not None:
            after[timestep, :count] = states[:count]
    return y, states
