"""The network alone: the bare loops that serving is compared with, and the outputs that are right.

Serving is compared with torch's `nn.GRU` or `nn.LSTM`, or with the module whose step is served, with the weights of the
served model; for a user's model with the model's own step. Outputs are compared with those of the model's own step, in
this process and without an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.connection import BareConnection
from benchmarks.load import F64, ClosedLoopStreams, Drive, Inputs, open_streams
from benchmarks.measurement import Bench
from instep.core.typing import F32, I64, U8, Bool
from instep.models.folder import load_model, make_model, write_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client.key_files import ClientKeys
from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import U64, ServerInfo

Array: TypeAlias = npt.NDArray[Any]
MAX_ROWS: Final = 256
"""In one batch of the servers that are measured."""


class WrongOutput(Exception):
    """An output differs from what the network computes; the message says how many streams are affected."""


class LeftOut(Exception):
    """A row makes no sense for the user's model; the message says why."""


class Batch(Protocol):
    """Rows that are stepped together, from their initial states on."""

    def step(self, x: torch.Tensor, /) -> torch.Tensor:
        """Step float32 [rows, features] to outputs [rows, outputs], which are valid until the next step."""

    def states(self) -> U8:
        """The rows' states as bytes [rows, row_bytes], a copy."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network without an engine."""

    name: str
    """What it is called in rows and errors."""
    outputs: int
    """Values in one output."""
    batch: Callable[[int], Batch]
    """A batch of so many rows in the initial state."""
    run: Callable[[F32], object]
    """Computes sequences [timesteps, rows, features] in one call; raises LeftOut where it has none."""


class TorchBatch:
    """A `Batch` of a module of torch.

    Args:
        call: takes float32 [rows, features] and the states, and gives the outputs and the new states.
        states: the initial ones, each [rows, n] or, as those of torch's own layers, [layers, rows, n].
    """

    def __init__(
        self, call: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]], states: tuple[torch.Tensor, ...]
    ) -> None:
        self._call, self._states = call, states

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One call of the module."""
        y, self._states = self._call(x, *self._states)
        return y

    def states(self) -> U8:
        """The bytes of [rows, layers, n], for each of the states."""
        leaves = (leaf if leaf.dim() == 2 else leaf.transpose(0, 1).flatten(1) for leaf in self._states)
        rows: F32 = torch.cat(list(leaves), 1).numpy()
        return rows.view(np.uint8)


def torch_layers(layers: torch.nn.RNNBase) -> Network:
    """The `nn.GRU` or `nn.LSTM` of torch, whose states are zeros at first."""
    is_lstm = layers.mode == "LSTM"

    def call(x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y, new = layers(x.unsqueeze(0), states if is_lstm else states[0])
        return y[0], new if is_lstm else (new,)

    def batch(rows: int) -> TorchBatch:
        zeros = torch.zeros(layers.num_layers, rows, layers.hidden_size)
        return TorchBatch(call, (zeros, zeros) if is_lstm else (zeros,))

    def run(x: F32) -> object:
        return layers(torch.from_numpy(x))

    return Network(f"nn.{type(layers).__name__}", layers.hidden_size, batch, run)


class OwnBatch:
    """A `Batch` of a model as the engine steps it, on the CPU."""

    def __init__(self, model: PortableNetwork, rows: int) -> None:
        self._x, self._y = (
            np.zeros((rows, width), np.float32) for width in (model.description.features, model.description.outputs)
        )
        self._states = model.state.initial(rows)
        self._rows = model.bind(self._x, self._states, self._y)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One step of the model."""
        self._x[:] = x.numpy()
        self._rows.run_all(len(x))
        return torch.from_numpy(self._y)

    def states(self) -> U8:
        """As the engine keeps them."""
        return self._states.copy()


def own_network(served: Model) -> Network:
    """A model as the engine steps it, from its initial state."""
    model = PortableNetwork(served)

    def run(x: F32) -> None:
        if model.sequence(x, model.state.initial(x.shape[1])) is None:
            raise LeftOut("the model has no call for whole sequences to compare with")

    return Network("the model", model.description.outputs, partial(OwnBatch, model), run)


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model folder for the engine, and the same network without one."""

    folder: Path
    description: str
    features: int
    state: StateSpec
    network: Network
    """What serving is compared with: the quickest way to step."""
    truth: Network
    """The reference that outputs are compared with, bit for bit."""

    @classmethod
    def of(cls, bench: Bench, name: str, features: int = 40, hidden: int = 128, layers: int = 1) -> BenchmarkModel:
        """The user's model where the run has one; else a GRU of random weights, the same in every run.

        Raises:
            ModelError: when the user's folder holds no model.
        """
        if bench.model is not None:
            return cls._own(bench.model)
        description = GruDescription(features=features, gru=GruLayers(hidden_size=hidden, num_layers=layers))
        model = make_model(description, init="random", seed=1, name="benchmark")
        write_model(bench.folder / name, model)
        gru = torch.nn.GRU(features, hidden, layers)
        gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
        sizes = str(hidden) if layers == 1 else f"{layers}×{hidden}"
        words, folder = f"GRU {features}→{sizes}, float32", bench.folder / name
        return cls(folder, words, features, description.state, torch_layers(gru.eval()), own_network(model))

    @classmethod
    def _own(cls, folder: Path) -> BenchmarkModel:
        model = load_model(folder)
        description, network = model.description, own_network(model)
        return cls(
            folder=folder,
            description=f"{model.name}: {description.in_words()}",
            features=description.features,
            state=description.state,
            network=network,
            truth=network,
        )

    @property
    def output_bytes(self) -> int:
        """Size of one output."""
        return self.truth.outputs * 4

    def inputs(self, timesteps: int, streams: int) -> F32:
        """Random float32 [timesteps, streams, features], the same in every run."""
        return np.random.default_rng(1).standard_normal((timesteps, streams, self.features), np.float32)

    def lone_inputs(self, timesteps: int, streams: int) -> list[Inputs]:
        """The same, for streams that each send messages of their own."""
        x = self.inputs(timesteps, streams)
        return [Inputs.of(x[:, stream : stream + 1]) for stream in range(streams)]


@torch.inference_mode()
def step_times(network: Network, x: F32, seconds: float) -> F64:
    """The seconds of each step of `x` [timesteps, rows, features], repeated for some time with the state carried."""
    inputs = torch.from_numpy(x)
    batch = network.batch(x.shape[1])
    times: list[float] = []
    began = time.perf_counter()
    deadline = began + seconds
    while began < deadline:
        batch.step(inputs[len(times) % len(x)])
        ended = time.perf_counter()
        times.append(ended - began)
        began = ended
    return np.array(times)


def bare_loop(network: Network, x: F32, seconds: float) -> float:
    """Frames per second of stepping `x` [timesteps, rows, features] without an engine."""
    times = step_times(network, x, seconds)
    return len(times) * int(x.shape[1]) / float(times.sum())


@torch.inference_mode()
def whole(network: Network, x: F32, frames: int) -> float:
    """Frames per second of one call over sequences that are padded to `x` [longest, sequences, features]."""
    start = time.perf_counter()
    network.run(x)
    return frames / (time.perf_counter() - start)


@torch.inference_mode()
def truth(network: Network, x: F32, counts: I64, last: int = 1) -> tuple[F32, U8]:
    """The outputs and states of a network, stepped from its initial state.

    Args:
        network: the plain one.
        x: inputs [timesteps, streams, features], repeated after the last.
        counts: how many frames each stream has sent [streams].
        last: how many outputs to return.

    Returns:
        The last outputs [last, streams, outputs], zeros where a stream has fewer; final states [streams, row_bytes].
    """
    streams = len(counts)
    inputs = torch.from_numpy(x)
    batch = network.batch(streams)
    states = batch.states()
    outputs = np.zeros((last, streams, network.outputs), np.float32)
    first_needed = int(counts.min()) - last
    for timestep in range(int(counts.max())):
        y = batch.step(inputs[timestep % len(x)])
        if timestep >= first_needed:
            remaining = counts - 1 - timestep
            ends = np.flatnonzero(remaining == 0)
            if len(ends):
                states[ends] = batch.states()[ends]
            near = np.flatnonzero((remaining >= 0) & (remaining < last))
            outputs[last - 1 - remaining[near], near] = y.numpy()[near]
    return outputs, states


class Closer(Protocol):
    """Closes streams, as `BareConnection` does."""

    info: ServerInfo

    def close(self, handles: U64, /) -> U8:
        """Close streams [N], and return their final states [N, row_bytes]."""


def check_and_close(connection: Closer, groups: Sequence[ClosedLoopStreams], network: Network) -> None:
    """Close the streams and compare each one's final state and newest outputs with the network's, bit for bit.

    Nothing is in flight.

    Raises:
        WrongOutput: where anything differs.
    """
    wrong = total = 0
    spec = connection.info.state
    for batch in _batches(groups):
        steps = batch[0].inputs.steps
        counts = np.concatenate([np.full(len(group.handles), group.answered * steps) for group in batch])
        outputs, states = truth(network, _inputs(batch), counts, steps)
        served_states = connection.close(np.concatenate([group.handles for group in batch]))
        served_outputs = np.concatenate([group.outputs(network.outputs) for group in batch], axis=1)
        right = _equal(served_outputs, outputs).all(axis=(0, 2))
        expected = spec.unpack(states)
        for name, served in spec.unpack(served_states).items():
            right &= _equal(served, expected[name]).reshape(len(counts), -1).all(axis=1)
        wrong += int((~right).sum())
        total += len(counts)
    if wrong:
        raise WrongOutput(f"{wrong:,} of {total:,} streams differ from {network.name}, so no figure of this row counts")


def measured(
    endpoint: str,
    model: BenchmarkModel,
    inputs: Sequence[Inputs],
    drive: Drive,
    *,
    once: bool = False,
    keys: ClientKeys | None = None,
) -> float:
    """What a loop measures over a new connection with new streams of these inputs.

    With `once` the inputs are sent once; otherwise they are repeated.

    Raises:
        WrongOutput: when the outputs are not the network's.
        NotServed: when the server refuses a request or does not answer.
    """
    width = max(each.steps * each.x.shape[1] for each in inputs)
    with BareConnection(endpoint, width * model.output_bytes, keys) as connection:
        connection.hello()
        groups = open_streams(connection, inputs, once=once)
        found = drive(connection, groups)
        check_and_close(connection, groups, model.truth)
    return found


def _equal(served: Array, expected: Array) -> Bool:
    size = served.dtype.itemsize
    bits = (np.ascontiguousarray(array).view(f"u{size}") for array in (served, expected))
    return np.asarray(np.equal(*bits))


def _batches(groups: Sequence[ClosedLoopStreams]) -> Iterator[list[ClosedLoopStreams]]:
    """Groups that can be stepped together: they started at the same input, and repeat theirs at the same time."""
    batch: list[ClosedLoopStreams] = []
    for group in groups:
        rows = sum(len(each.handles) for each in batch) + len(group.handles)
        if batch and (rows > MAX_ROWS or group.first != batch[0].first):
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
