"""The network alone: the bare loops that serving is compared with, and the outputs that are right.

Both are torch's own `nn.GRU` in this process, with the weights of the served model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.connection import BareConnection
from benchmarks.load import F64, ClosedLoopStreams
from instep.core.typing import F32, I64, Bool
from instep.models.folder import make_model, write_model
from instep.models.gru.description import GruDescription, GruLayers


class WrongOutput(Exception):
    """An output differs from what `nn.GRU` computes; the message says how many streams are affected."""


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A network of random weights, the same in every run: a folder for the engine and torch's own module."""

    folder: Path
    gru: torch.nn.GRU
    description: str

    @classmethod
    def make(cls, folder: Path, features: int = 40, hidden: int = 128, layers: int = 1) -> BenchmarkModel:
        """Write the folder."""
        description = GruDescription(features=features, gru=GruLayers(hidden_size=hidden, num_layers=layers))
        model = make_model(description, init="random", seed=1, name="benchmark")
        write_model(folder, model)
        gru = torch.nn.GRU(features, hidden, layers)
        gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
        sizes = str(hidden) if layers == 1 else f"{layers}×{hidden}"
        return cls(folder, gru.eval(), f"GRU {features}→{sizes}, float32")

    @property
    def output_bytes(self) -> int:
        """Size of one output."""
        return self.gru.hidden_size * 4

    def inputs(self, timesteps: int, streams: int) -> F32:
        """Random float32 [timesteps, streams, features], the same in every run."""
        shape = (timesteps, streams, self.gru.input_size)
        return np.random.default_rng(1).standard_normal(shape, np.float32)


@torch.inference_mode()
def step_times(gru: torch.nn.GRU, x: F32, seconds: float) -> F64:
    """The seconds of each step of `x` [timesteps, rows, features], repeated for some time with the state carried."""
    inputs = torch.from_numpy(x)
    h = torch.zeros(gru.num_layers, x.shape[1], gru.hidden_size)
    times: list[float] = []
    began = time.perf_counter()
    deadline = began + seconds
    while began < deadline:
        _, h = gru(inputs[len(times) % len(x)].unsqueeze(0), h)
        ended = time.perf_counter()
        times.append(ended - began)
        began = ended
    return np.array(times)


def bare_loop(gru: torch.nn.GRU, x: F32, seconds: float) -> float:
    """Frames per second of stepping `x` [timesteps, rows, features] without an engine."""
    times = step_times(gru, x, seconds)
    return len(times) * int(x.shape[1]) / float(times.sum())


@torch.inference_mode()
def whole(gru: torch.nn.GRU, x: F32, frames: int) -> float:
    """Frames per second of one call over sequences that are padded to `x` [longest, sequences, features]."""
    inputs = torch.from_numpy(x)
    start = time.perf_counter()
    gru(inputs)
    return frames / (time.perf_counter() - start)


@torch.inference_mode()
def truth(gru: torch.nn.GRU, x: F32, counts: I64, last: int = 1, buckets: Sequence[int] = ()) -> tuple[F32, F32]:
    """The outputs and states of `nn.GRU`, stepped from a state of zeros.

    Args:
        gru: the network.
        x: inputs [timesteps, streams, features], repeated after the last.
        counts: how many frames each stream has sent [streams].
        last: how many outputs to return.
        buckets: ascending batch sizes that the engine certified to give equal bits. The streams are stepped in a batch
            of the first that is large enough, padded with zeros, because torch may give other bits in other sizes.

    Returns:
        The last outputs [last, streams, outputs], zeros where a stream has fewer; final states [streams, layers, size].
    """
    streams = len(counts)
    rows = next((bucket for bucket in buckets if bucket >= streams), streams)
    inputs = torch.from_numpy(np.pad(x, ((0, 0), (0, rows - streams), (0, 0))) if rows > streams else x)
    h = torch.zeros(gru.num_layers, rows, gru.hidden_size)
    outputs = np.zeros((last, streams, gru.hidden_size), np.float32)
    states = np.zeros((streams, gru.num_layers, gru.hidden_size), np.float32)
    first_needed = int(counts.min()) - last
    for timestep in range(int(counts.max())):
        y, h = gru(inputs[timestep % len(x)].unsqueeze(0), h)
        if timestep >= first_needed:
            remaining = counts - 1 - timestep
            ends = np.flatnonzero(remaining == 0)
            states[ends] = h[:, :streams].numpy()[:, ends].swapaxes(0, 1)
            near = np.flatnonzero((remaining >= 0) & (remaining < last))
            outputs[last - 1 - remaining[near], near] = y[0, :streams].numpy()[near]
    return outputs, states


def check_and_close(
    connection: BareConnection, groups: Sequence[ClosedLoopStreams], gru: torch.nn.GRU, *, exact: bool = True
) -> None:
    """Close the streams and compare each one's final state and newest outputs with `nn.GRU`.

    Args:
        connection: of the streams.
        groups: with nothing in flight.
        gru: the served network.
        exact: compare bit for bit; otherwise within rounding errors.

    Raises:
        WrongOutput: where anything differs.
    """
    wrong = total = 0
    buckets = connection.info.buckets
    for batch in _batches(groups, buckets[-1]):
        steps, size = batch[0].inputs.steps, gru.hidden_size
        counts = np.concatenate([np.full(len(group.handles), group.answered * steps) for group in batch])
        outputs, states = truth(gru, _inputs(batch), counts, steps, buckets)
        served_states = connection.close(np.concatenate([group.handles for group in batch]))
        served_outputs = np.concatenate([group.outputs(size) for group in batch], axis=1)
        right = _equal(served_states, states, exact).all(axis=(1, 2))
        right &= _equal(served_outputs, outputs, exact).all(axis=(0, 2))
        wrong += int((~right).sum())
        total += len(counts)
    if wrong:
        raise WrongOutput(f"{wrong:,} of {total:,} streams differ from nn.GRU, so no figure of this row counts")


def _equal(served: F32, expected: F32, exact: bool) -> Bool:
    if not exact:
        return np.isclose(served, expected, rtol=1e-4, atol=1e-5)
    equal: Bool = np.ascontiguousarray(served).view(np.int32) == expected.view(np.int32)
    return equal


def _batches(groups: Sequence[ClosedLoopStreams], most_rows: int) -> Iterator[list[ClosedLoopStreams]]:
    """Groups that can be stepped together: they started at the same input, and repeat theirs at the same time."""
    batch: list[ClosedLoopStreams] = []
    for group in groups:
        rows = sum(len(each.handles) for each in batch) + len(group.handles)
        if batch and (rows > most_rows or group.first != batch[0].first):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _inputs(batch: Sequence[ClosedLoopStreams]) -> F32:
    """The inputs of several groups next to each other, from the first that was sent, padded to the longest."""
    first = batch[0].first * batch[0].inputs.steps
    if len(batch) == 1 and not first:
        return batch[0].inputs.x
    longest = max(len(group.inputs.x) for group in batch)
    columns = (np.roll(group.inputs.x, -first, axis=0) for group in batch)
    return np.concatenate([np.pad(x, ((0, longest - len(x)), (0, 0), (0, 0))) for x in columns], axis=1)
