"""Stepping rows of states with a bound step from the host: for certification, replay and tests.

The server's own path is in `runtime`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import BoundStep, Floats, StateSpec


def giver(tensor: torch.Tensor) -> Callable[[npt.NDArray[Any]], object]:
    """A function that copies an array of its shape into a tensor, wherever that is."""
    if tensor.device.type == "cpu":
        return partial(np.copyto, tensor.numpy())
    return lambda values: tensor.copy_(torch.tensor(values))


def finder(tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
    """A function that returns what a tensor holds, wherever that is: an array that is valid until the next step."""
    if tensor.device.type == "cpu":
        array = tensor.numpy()
        return lambda: array
    return lambda: tensor.cpu().numpy()


def put(tensor: torch.Tensor, values: npt.NDArray[Any]) -> None:
    """Copy an array into a tensor of its shape, wherever that is."""
    giver(tensor)(values)


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
    give, found = giver(step.x[:, : x.shape[2]]), finder(step.y[:, :outputs])
    for frame, answers in zip(x, y, strict=True):
        give(frame)
        step.run()
        answers[...] = found()
        keep_state(step)
    return y, read_state(step, spec)


def step_batches(step: BoundStep, spec: StateSpec, x: F32, rows: U8, batches: I64, outputs: int) -> U8:
    """Step one batch after another, each from its own states.

    Args:
        step: of B rows.
        spec: of the states.
        x: frames [R, features].
        rows: of states before them, uint8 [R, row_bytes].
        batches: [K, B]: which of the R are in each batch.
        outputs: values per frame.

    Returns:
        uint8 [K · B, answer bytes], as `answers_of`.
    """
    count = batches.shape[1]
    answers = np.zeros((batches.size, outputs * x.itemsize + spec.row_bytes), np.uint8)
    y, after = split_answers(spec, answers)
    before = spec.unpack(rows)
    given = [(giver(step.x[:, : x.shape[1]]), x), *((giver(step.state[name]), before[name]) for name in before)]
    found = [(finder(step.y[:, :outputs]), y), *((finder(step.new_state[name]), after[name]) for name in after)]
    for first, batch in zip(range(0, batches.size, count), batches, strict=True):
        for give, values in given:
            give(values[batch])
        step.run()
        for find, results in found:
            results[first : first + count] = find()
    return answers


def answers_of(y: F32, states: U8) -> U8:
    """Outputs [R, ...] and rows of states after them as bytes, one row for each."""
    return np.concatenate([np.ascontiguousarray(y).reshape(len(states), -1).view(np.uint8), states], axis=1)


def split_answers(spec: StateSpec, answers: U8) -> tuple[F32, dict[str, npt.NDArray[Any]]]:
    """The outputs [R, ...] and the leaves after them [R, *shape] in `answers_of`, as views."""
    size = answers.shape[1] - spec.row_bytes
    return answers[:, :size].view(np.float32), spec.unpack(answers[:, size:])


class Trial:
    """Random frames, each with a state, to compare steps of a model by: always the same ones."""

    def __init__(self, spec: StateSpec, features: int, outputs: int, rows: int) -> None:
        random = np.random.default_rng(2)
        self._spec, self._outputs, self.rows = spec, outputs, rows
        self._x = random_frames(features, random, rows)
        self._states = random_states(spec, random, rows, spec.initial(1))

    def answers(self, step: BoundStep) -> U8:
        """As `answers_of`: to each of the `rows`, and to some again to fill the last batch."""
        bucket = len(step.x)
        batches = np.arange(-(-self.rows // bucket) * bucket).reshape(-1, bucket) % self.rows
        return step_batches(step, self._spec, self._x, self._states, batches, self._outputs)


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
