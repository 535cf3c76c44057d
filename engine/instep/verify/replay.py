"""The two replays through the served network: frame by frame, and the whole sequence in one call."""

from __future__ import annotations

import bisect

import numpy as np
import torch

from instep.core.typing import F32, I64
from instep.models.network import Network


def replay_stepped(network: Network, buckets: tuple[int, ...], x: F32, h: F32, active: I64) -> tuple[F32, F32]:
    """Step sequences side by side, the longest first; each step takes the smallest bucket that holds who is left.

    Args:
        network: what is stepped.
        buckets: ascending; the last one holds all rows.
        x: frames [T, R, features].
        h: states before them [layers, R, state size]; not changed.
        active: [T], descending: how many rows have a frame at each timestep.

    Returns:
        Outputs [T, R, outputs], meaningless where a row has no frame, and the states after each row's last frame.
    """
    steps, rows, _ = x.shape
    counts = active.tolist()
    bucket = _bucket(buckets, rows)
    outputs = torch.zeros(steps, rows, network.outputs, device=network.device)
    finals = h.copy()
    with torch.inference_mode():
        frames = _frames(network, x, bucket)
        states = _states(network, h, bucket)
        for timestep, count in enumerate(counts):
            if (smaller := _bucket(buckets, count)) < bucket:
                bucket = smaller
                states = states[:, :bucket].contiguous()
            y = network.advance(frames[timestep, :bucket], states)
            outputs[timestep, :count] = y[:count, : network.outputs]
            left = counts[timestep + 1] if timestep + 1 < steps else 0
            if left < count:
                finals[:, left:count] = states[:, left:count, : network.state_size].cpu().numpy()
    return outputs.cpu().numpy(), finals


def replay_whole(network: Network, buckets: tuple[int, ...], x: F32, h: F32) -> tuple[F32, F32]:
    """Run sequences side by side in one call; those that end earlier go on with zeros, which nobody looks at.

    Arguments and outputs as in `replay_stepped`. The states are those after timestep T, so they mean something for the
    rows that have T frames.
    """
    rows = x.shape[1]
    bucket = _bucket(buckets, rows)
    with torch.inference_mode():
        y, states = network.sequence(_frames(network, x, bucket), _states(network, h, bucket))
        outputs = y[:, :rows, : network.outputs].contiguous().cpu().numpy()
        return outputs, states[:, :rows, : network.state_size].cpu().numpy()


def _bucket(buckets: tuple[int, ...], rows: int) -> int:
    return buckets[bisect.bisect_left(buckets, rows)]


def _frames(network: Network, x: F32, bucket: int) -> torch.Tensor:
    """Frames on the device, padded with zeros to the bucket and the network's width where they do not fill them."""
    if x.shape[1:] == (bucket, network.input_width):
        return torch.from_numpy(x).to(network.device)
    padded = np.zeros((x.shape[0], bucket, network.input_width), np.float32)
    padded[:, : x.shape[1], : x.shape[2]] = x
    return torch.from_numpy(padded).to(network.device)


def _states(network: Network, h: F32, bucket: int) -> torch.Tensor:
    """States on the device, padded with zeros to the bucket and the network's width."""
    padded = np.zeros((h.shape[0], bucket, network.state_width), np.float32)
    padded[:, : h.shape[1], : h.shape[2]] = h
    return torch.from_numpy(padded).to(network.device)
