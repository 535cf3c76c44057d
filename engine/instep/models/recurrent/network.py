"""A recurrent network on one device: frame layers, a GRU, LSTM or RNN, frame layers.

Bits are part of the contract. The recurrent layers are torch's own function for them (`torch.gru`, the very operation
behind `nn.GRU`, and its like) or, one frame at a time and where certification found the same bits, a step by hand. A
network without frame layers is not padded: its bits are those of the user's own module. With frame layers, two things
would make a row's bits depend on how many rows are beside it, and both are designed out: every dense layer is one
`addmm` over contiguous 2-D rows, stepping and over a whole sequence alike, and all widths are padded with zeros to
multiples of 32, so that the same matrix kernels serve every number of rows. A padded hidden unit has zero weights and
biases and stays exactly 0. (Where a dense layer overflows to infinity, 0 · inf makes its padded neighbours NaN: values
beyond float32 are not promised.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from instep.core.typing import F32, U8
from instep.models.base import StateSpec
from instep.models.model import Model
from instep.models.recurrent.cell import BY_HAND, Kernel, Recurrence, layer_weights
from instep.models.recurrent.description import GruLayers, LstmLayers, RecurrentDescription, RecurrentLayers, RnnLayers
from instep.models.recurrent.frame_layers import WIDTH_MULTIPLE, apply, on_device, pad, padded_width
from instep.models.recurrent.gru import Gru
from instep.models.recurrent.lstm import Lstm
from instep.models.recurrent.reference import RecurrentReference
from instep.models.recurrent.rnn import Rnn
from instep.models.recurrent.step import RecurrentStep, Weights
from instep.models.stepping import Trial

PADDED_BUCKET: Final = 32
"""Rows of a network with frame layers come in multiples of it: `sigmoid` treats the last elements of an array that does
not fill its vectors with other code."""
PLAIN_BUCKET: Final = 4
"""Rows of a network without: fewer than four use matrix-vector kernels."""
TRIAL_BUCKETS: Final = (64, 512)
TRIAL_ROWS: Final = 512
"""Every trial bucket fills its batches with them, so that answers of different buckets can be compared."""


class RecurrentNetwork:
    """A `RecurrentModel`."""

    least_probes = 8

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, RecurrentDescription)
        self.model = model
        self.description: RecurrentDescription = model.description
        self.fingerprint = model.fingerprint
        self.device = device
        self.state: StateSpec = model.state
        padded = bool(self.description.before or self.description.after)
        self.row_multiple = PADDED_BUCKET if padded else PLAIN_BUCKET
        shapes = self.description.tensor_shapes()
        self.multiply_adds = sum(
            math.prod(shapes[name]) for name in shapes if "weight" in name and len(shapes[name]) == 2
        )
        self._size = self.description.recurrent.hidden_size
        self._recurrence = _recurrence(self.description.recurrent)
        self._weights = self._padded_weights(WIDTH_MULTIPLE if padded else 1)
        self._answered: dict[tuple[Kernel, int, int], bytes] = {}
        """Digests of the answers to a trial by kernel, bucket and rows: some are compared with several others."""
        self.kernel: Kernel = "torch"
        """`select_step` decides."""
        fills_vectors = self._weights.width % self._recurrence.width_multiple == 0
        self.may_step_by_hand = device.type == "cpu" and fills_vectors
        """Whether it is worth trying."""

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """Step by hand where at least `rows` frames get the bits of torch's own step in each bucket."""
        plain = self._plain
        by_hand = BY_HAND if self.may_step_by_hand and plain == self._recurrence.plain else ()
        trial = self._trial(rows)
        self.kernel = next((each for each in by_hand if self._is_same(each, plain, buckets, trial)), plain)

    def select_quickest(self) -> None:
        """Step by hand on the CPU."""
        self.kernel = BY_HAND[0] if self.may_step_by_hand else "torch"

    def bind(self, rows: int) -> RecurrentStep:
        """The step of a batch of `rows`."""
        return RecurrentStep(self._weights, rows, self._size, self.kernel)

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8]:
        """T frames of every row in one call of torch's function; see `RecurrentModel.sequence`."""
        weights = self._weights
        steps, count, features = x.shape
        frames = torch.zeros(steps * count, weights.input_width)
        frames[:, :features] = torch.from_numpy(x).view(steps * count, features)
        states = {}
        for name, leaf in self.state.unpack(state).items():
            padded = torch.zeros(len(weights.layers), count, weights.width)
            padded[:, :, : self._size] = torch.from_numpy(leaf.copy()).transpose(0, 1)
            states[name] = padded.to(self.device)
        rows = apply(weights.before, frames.to(self.device))
        y, after = weights.call(self.kernel, rows.view(steps, count, -1), states)
        y = apply(weights.after, y.reshape(steps * count, -1)).view(steps, count, -1)
        outputs = y[:, :, : self.description.outputs].cpu().contiguous().numpy()
        leaves = {name: leaf.transpose(0, 1)[:, :, : self._size].cpu().numpy() for name, leaf in after.items()}
        return outputs, self.state.pack(leaves)

    def reference(self, dtype: type[np.floating[Any]]) -> RecurrentReference:
        """The equations in numpy."""
        weights = {name: tensor.numpy() for name, tensor in self.model.weights.items()}
        return RecurrentReference(self.description.as_json(), weights, dtype)

    @cached_property
    def _plain(self) -> Kernel:
        """Torch's own step whose bits are served.

        There are two for an LSTM, with oneDNN and without, and steps by hand have the bits of the second. It is chosen
        where it gives frames the same bits in small and large batches, and steps by hand give them too. The batches are
        the same in every process on a machine, since a recording is verified in others than it was made in.
        """
        plain = self._recurrence.plain
        if plain == "torch" or not self.may_step_by_hand:
            return "torch"
        buckets = (self.row_multiple, *TRIAL_BUCKETS)
        trial = self._trial(TRIAL_ROWS)
        is_one = len({self._answers(plain, bucket, trial) for bucket in buckets}) == 1
        has_its_bits = (self._is_same(each, plain, buckets, trial) for each in BY_HAND)
        return plain if is_one and any(has_its_bits) else "torch"

    def _is_same(self, kernel: Kernel, plain: Kernel, buckets: Sequence[int], trial: Trial) -> bool:
        both = ((self._answers(each, bucket, trial) for each in (kernel, plain)) for bucket in buckets)
        return all(one == other for one, other in both)

    def _trial(self, rows: int) -> Trial:
        return Trial(self.state, self.description.features, self.description.outputs, rows)

    def _answers(self, kernel: Kernel, bucket: int, trial: Trial) -> bytes:
        key = kernel, bucket, trial.rows
        if key not in self._answered:
            step = RecurrentStep(self._weights, bucket, self._size, kernel)
            self._answered[key] = sha256(trial.answers(step).data).digest()
        return self._answered[key]

    def _padded_weights(self, multiple: int) -> Weights:
        description, given = self.description, self.model.weights
        layers = description.recurrent
        input_width, width = padded_width(description.features, multiple), padded_width(self._size, multiple)
        inputs = padded_width(description.recurrent_inputs, multiple)
        # Torch's module lays weights out as the device wants them.
        module: nn.RNNBase = getattr(nn, layers.NAME)(
            inputs, width, layers.num_layers, bias=layers.bias, device=self.device
        )
        module.requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.copy_(_pad_gates(given[f"{description.kind}.{name}"], layers.GATES, parameter.shape))
        flat: list[torch.Tensor] = list(module.parameters())
        return Weights(
            before=on_device("before", description.before, description.features, given, self.device),
            recurrence=self._recurrence,
            layers=layer_weights(flat, layers.num_layers),
            flat=flat,
            after=on_device("after", description.after, self._size, given, self.device),
            input_width=input_width,
            width=width,
            leaves=layers.LEAVES,
            device=self.device,
        )


def _recurrence(layers: RecurrentLayers) -> Recurrence:
    match layers:
        case GruLayers():
            return Gru()
        case LstmLayers():
            return Lstm()
        case RnnLayers():
            return Rnn(layers.nonlinearity)
    raise TypeError(layers)


def _pad_gates(tensor: torch.Tensor, gates: int, shape: Sequence[int]) -> torch.Tensor:
    """A recurrent layer's tensor [gates · hidden, …] padded to `shape`, each of its gates by itself."""
    rows, *columns = shape
    return pad(tensor.view(gates, -1, *tensor.shape[1:]), (gates, rows // gates, *columns)).flatten(0, 1)
