"""The two replays through the served network: frame by frame, and the whole sequence in one call."""

from __future__ import annotations

import bisect

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import RecurrentModel
from instep.models.stepping import keep_state, load_state, put, read_state


def replay_stepped(
    network: RecurrentModel, buckets: tuple[int, ...], x: F32, states: U8, active: I64, after: U8 | None = None
) -> tuple[F32, U8]:
    """Step sequences side by side, the longest first; each step takes the smallest bucket that holds those left.

    Args:
        network: the model.
        buckets: ascending; the last one holds all rows.
        x: frames [T, R, features].
        states: before them, rows of bytes [R, row_bytes]; not changed.
        active: [T], descending: how many rows have a frame at each timestep.
        after: uint8 [T, R, row_bytes], filled with the state after each frame; None where nobody asks.

    Returns:
        Outputs [T, R, outputs], meaningless where a row has no frame, and the states after each row's last frame.
    """
    steps, rows, _ = x.shape
    counts = active.tolist()
    bucket = _bucket(buckets, rows)
    outputs = np.zeros((steps, rows, network.description.outputs), np.float32)
    finals = states.copy()
    with torch.inference_mode():
        step = network.bind(bucket)
        load_state(step, network.state, _padded(network, states, bucket))
        for timestep, count in enumerate(counts):
            if (smaller := _bucket(buckets, count)) < bucket:
                bucket = smaller
                before, step = step, network.bind(bucket)
                for name, leaf in step.state.items():
                    leaf.copy_(before.new_state[name][:bucket])
            put(step.x[:count, : x.shape[2]], x[timestep, :count])
            step.run()
            outputs[timestep, :count] = step.y[:count, : network.description.outputs].cpu().numpy()
            if after is not None:
                after[timestep, :count] = read_state(step, network.state, slice(count))
            left = counts[timestep + 1] if timestep + 1 < steps else 0
            if left < count:
                finals[left:count] = read_state(step, network.state, slice(left, count))
            keep_state(step)
    return outputs, finals


def replay_whole(network: RecurrentModel, buckets: tuple[int, ...], x: F32, states: U8) -> tuple[F32, U8]:
    """Run sequences side by side in one call; those that end earlier are padded with zeros.

    Arguments and outputs as in `replay_stepped`. The states are those after timestep T: valid only for rows that
    have T frames.
    """
    rows = x.shape[1]
    bucket = _bucket(buckets, rows)
    padded = np.zeros((x.shape[0], bucket, x.shape[2]), np.float32)
    padded[:, :rows] = x
    with torch.inference_mode():
        whole = network.sequence(padded, _padded(network, states, bucket))
    assert whole is not None
    y, finals = whole
    return np.ascontiguousarray(y[:, :rows]), finals[:rows]


def _bucket(buckets: tuple[int, ...], rows: int) -> int:
    return buckets[bisect.bisect_left(buckets, rows)]


def _padded(network: RecurrentModel, states: U8, bucket: int) -> U8:
    """States, padded with initial ones to the bucket."""
    rows = network.state.initial(bucket)
    rows[: len(states)] = states
    return rows
