"""Frames on their way into a padded batch, and outputs on their way back: one pass each, compiled."""

from __future__ import annotations

from instep.core.compiled import kernel
from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64


@kernel
def stage(slots: I64, rows: I64, inputs: F32, batch_slots: I64, batch_x: F32) -> None:
    """Fill a batch: its slots and frames, the scratch slot and zeros where it is padded.

    Args:
        slots: int64 [B].
        rows: int64 [B], of `inputs`.
        inputs: float32 [capacity, features].
        batch_slots: int64 [bucket].
        batch_x: float32 [bucket, at least features]; columns beyond the features stay as they are.
    """
    features = inputs.shape[1]
    for place in range(len(slots)):
        batch_slots[place] = slots[place]
        # Slices: loops over them become copies of whole vectors, those over two indices do not.
        frame, target = inputs[rows[place]], batch_x[place, :features]
        for value in range(features):
            target[value] = frame[value]
    for place in range(len(slots), len(batch_slots)):
        batch_slots[place] = SCRATCH_SLOT
        batch_x[place, :features] = 0.0


@kernel
def unstage(batch_y: F32, rows: I64, outputs: F32) -> None:
    """Copy the first B rows of a batch's outputs to `rows`, int64 [B], of float32 [capacity, outputs]."""
    width = outputs.shape[1]
    for place in range(len(rows)):
        y, target = batch_y[place, :width], outputs[rows[place]]
        for value in range(width):
            target[value] = y[value]
