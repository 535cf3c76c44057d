"""What is compared with, and what is right: torch's own `nn.GRU` in this process, and nothing around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from instep.bench.connection import Connection
from instep.bench.lanes import Lane
from instep.core.typing import F32, I64, Bool
from instep.models.description import GruLayers, NetworkDescription
from instep.models.folder import make_model, write_model


class WrongOutput(Exception):
    """What was served is not what `nn.GRU` computes; the message says how much of it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A network, in a folder for the engine and as torch's own module."""

    folder: Path
    gru: torch.nn.GRU
    words: str

    @classmethod
    def made(cls, folder: Path, features: int = 40, hidden: int = 128, layers: int = 1) -> Subject:
        """Random weights, the same in every run."""
        description = NetworkDescription(features=features, gru=GruLayers(hidden_size=hidden, num_layers=layers))
        model = make_model(description, init="random", seed=1, name="bench")
        write_model(folder, model)
        gru = torch.nn.GRU(features, hidden, layers)
        gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
        sizes = str(hidden) if layers == 1 else f"{layers} × {hidden}"
        return cls(folder, gru.eval(), f"GRU {features}→{sizes}, float32")

    @property
    def outputs(self) -> int:
        """Values in an output."""
        return self.gru.hidden_size

    def inputs(self, timesteps: int, streams: int) -> F32:
        """Float32 [timesteps, streams, features], the same in every run."""
        shape = (timesteps, streams, self.gru.input_size)
        return np.random.default_rng(1).standard_normal(shape, np.float32)


@torch.inference_mode()
def stepped(gru: torch.nn.GRU, x: F32, seconds: float) -> float:
    """Frames a second of stepping `x` [timesteps, rows, features] over and over, the state carried."""
    inputs = torch.from_numpy(x)
    h = torch.zeros(gru.num_layers, x.shape[1], gru.hidden_size)
    frames, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for timestep in range(len(x)):
            _, h = gru(inputs[timestep : timestep + 1], h)
        frames += x.shape[0] * x.shape[1]
    return frames / elapsed


@torch.inference_mode()
def step_s(gru: torch.nn.GRU, x: F32, seconds: float) -> float:
    """The median time, in seconds, of one step of `x` [timesteps, rows, features]."""
    inputs = torch.from_numpy(x)
    h = torch.zeros(gru.num_layers, x.shape[1], gru.hidden_size)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while (began := time.perf_counter()) < deadline:
        _, h = gru(inputs[len(times) % len(x)].unsqueeze(0), h)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


@torch.inference_mode()
def whole(gru: torch.nn.GRU, x: F32, lengths: I64) -> float:
    """Frames a second of one call over all sequences, padded to `x` [longest, sequences, features]."""
    inputs = torch.from_numpy(x)
    start = time.perf_counter()
    gru(inputs)
    return int(lengths.sum()) / (time.perf_counter() - start)


@torch.inference_mode()
def truth(gru: torch.nn.GRU, x: F32, counts: I64, last: int = 1, buckets: Sequence[int] = ()) -> tuple[F32, F32]:
    """What streams have after so many frames each, by `nn.GRU` one timestep after the other.

    Args:
        gru: with all states zero at first.
        x: inputs [timesteps, streams, features], beginning again after the last.
        counts: frames of each stream [streams].
        last: how many outputs to return.
        buckets: batch sizes that the engine found to give the same bits here, ascending: the streams are stepped as a
            batch of the first that takes them, rows of zeros beside them. torch gives other bits in others.

    Returns:
        The last outputs [last, streams, outputs], zeros where there were fewer; final states [streams, layers, size].
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
            back = counts - 1 - timestep  # how many frames of the stream are still to come
            ends = np.flatnonzero(back == 0)
            states[ends] = h[:, :streams].numpy()[:, ends].swapaxes(0, 1)
            near = np.flatnonzero((back >= 0) & (back < last))
            outputs[last - 1 - back[near], near] = y[0, :streams].numpy()[near]
    return outputs, states


def check_and_close(connection: Connection, lanes: Sequence[Lane], gru: torch.nn.GRU, *, exactly: bool = True) -> None:
    """End the lanes' streams and compare each one's final state, and its newest outputs, with `nn.GRU`.

    Args:
        connection: theirs.
        lanes: of which everything is answered.
        gru: what they should have been stepped with.
        exactly: bit for bit; else nearly.

    Raises:
        WrongOutput: where anything differs.
    """
    wrong, streams, buckets = 0, 0, connection.info.buckets
    for group in _groups(lanes, buckets[-1]):
        steps, size = group[0].feed.steps, gru.hidden_size
        counts = np.concatenate([np.full(len(lane.handles), lane.answered * steps) for lane in group])
        outputs, states = truth(gru, _inputs(group), counts, steps, buckets)
        got = connection.close(np.concatenate([lane.handles for lane in group]))
        newest = np.concatenate(
            [
                lane.outputs(size) if lane.answered else np.zeros((steps, len(lane.handles), size), np.float32)
                for lane in group
            ],
            axis=1,
        )
        ok = _same(got, states, exactly).all(axis=(1, 2)) & _same(newest, outputs, exactly).all(axis=(0, 2))
        wrong += int((~ok).sum())
        streams += len(counts)
    if wrong:
        raise WrongOutput(f"{wrong:,} of {streams:,} streams differ from nn.GRU: nothing that was measured counts")


def _same(got: F32, wanted: F32, exactly: bool) -> Bool:
    if not exactly:
        return np.isclose(got, wanted, rtol=1e-4, atol=1e-5)
    same: Bool = np.ascontiguousarray(got).view(np.int32) == wanted.view(np.int32)
    return same


def _groups(lanes: Sequence[Lane], most_rows: int) -> Iterator[list[Lane]]:
    """Lanes that can be stepped as one batch."""
    group: list[Lane] = []
    for lane in lanes:
        rows = sum(len(each.handles) for each in group) + len(lane.handles)
        if group and (rows > most_rows or not _fit(lane, group[0])):
            yield group
            group = []
        group.append(lane)
    if group:
        yield group


def _fit(lane: Lane, other: Lane) -> bool:
    """Whether inputs that begin again do so at the same timestep."""
    is_as_long = len(lane.feed.x) == len(other.feed.x)
    return lane.first == other.first and lane.feed.steps == other.feed.steps and (lane.once or is_as_long)


def _inputs(group: Sequence[Lane]) -> F32:
    """Their inputs side by side, from where they began, as long as the longest."""
    first = group[0].first * group[0].feed.steps
    if len(group) == 1 and not first:
        return group[0].feed.x
    longest = max(len(lane.feed.x) for lane in group)
    rows = (np.roll(lane.feed.x, -first, axis=0) for lane in group)
    return np.concatenate([np.pad(x, ((0, longest - len(x)), (0, 0), (0, 0))) for x in rows], axis=1)
