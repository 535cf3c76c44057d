"""Stepping rows of states with a bound step from the host: for certification, replay and tests.

The server's own path is in `runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import BoundStep, Floats, StateSpec


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


def step_frames(step: BoundStep, spec: StateSpec, x: F32, rows: U8, outputs: int) -> tuple[F32, U8]:
    """Step a whole batch over frames [T, B, features]: outputs [T, B, outputs] and rows of states after them."""
    y = np.empty((*x.shape[:2], outputs), np.float32)
    load_state(step, spec, rows)
    for frame, answers in zip(x, y, strict=True):
        put(step.x[:, : frame.shape[1]], frame)
        step.run()
        answers[...] = step.y[:, :outputs].cpu().numpy()
        keep_state(step)
    return y, read_state(step, spec)


def answers_of(y: F32, states: U8) -> U8:
    """Outputs [R, ...] and rows of states after them as bytes, one row for each."""
    return np.concatenate([np.ascontiguousarray(y).reshape(len(states), -1).view(np.uint8), states], axis=1)


def trial_answers(step: BoundStep, spec: StateSpec, features: int, outputs: int, rows: int) -> U8:
    """The answers to `rows` random frames, which are the same for every step, and to some again to fill the batch."""
    random = np.random.default_rng(2)
    x, states = random_frames(features, random, rows), random_states(spec, random, rows, spec.initial(1))
    bucket, found = len(step.x), []
    for first in range(0, rows, bucket):
        batch = np.arange(first, first + bucket) % rows
        found.append(answers_of(*step_rows(step, spec, x[batch], states[batch], outputs)))
    return np.concatenate(found)


def random_frames(features: int, random: np.random.Generator, count: int) -> F32:
    """Frames [count, features] of several magnitudes."""
    scale = random.choice([0.1, 1, 1, 5], (count, 1))
    return (scale * random.standard_normal((count, features))).astype(np.float32)


def random_states(spec: StateSpec, random: np.random.Generator, count: int, reached: U8) -> U8:
    """States of several magnitudes, some of them all zero: floats in ±1, integers and bools of reached states.

    Integers may be places in a buffer, where others would be out of bounds.
    """
    scale = random.choice([0, 0.1, 1, 1], count)
    rows = reached[random.integers(len(reached), size=count)]
    for leaf in spec.unpack(rows).values():
        if leaf.dtype.kind == "f":
            leaf[...] = random.uniform(-1, 1, leaf.shape) * scale.reshape(-1, *[1] * (leaf.ndim - 1))
    return rows


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
