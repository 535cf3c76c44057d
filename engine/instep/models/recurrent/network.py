"""The GRU network on one device: dense layers, the GRU, dense layers.

Bits are part of the contract. The GRU is `torch.gru`, the very operation behind `nn.GRU`, or, one frame at a time and
where certification found the same bits, the step by hand in `step`. A network without dense layers is not touched: its
bits are those of the user's own `nn.GRU`. With dense layers, two things would make a row's bits depend on how many rows
are beside it, and both are designed out: every dense layer is one `addmm` over contiguous 2-D rows, stepping and over a
whole sequence alike, and all widths are padded with zeros to multiples of 32, so that the same matrix kernels serve
every number of rows. A padded hidden unit has zero weights and biases and stays exactly 0. (Where a dense layer
overflows to infinity, 0 · inf makes its padded neighbours NaN: values beyond float32 are not promised.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from instep.core.typing import F32, U8
from instep.models.base import StateSpec
from instep.models.model import Model
from instep.models.recurrent.description import Activation, DenseLayer, GruDescription
from instep.models.recurrent.reference import GruReference
from instep.models.recurrent.step import BY_HAND, DenseWeights, GruKernel, GruStep, GruWeights, InPlace, LayerWeights

WIDTH_MULTIPLE: Final = 32
"""Widths of a network with dense layers are multiples of it. On a Xeon in MKL's strict mode 60 of 60 random networks
were exact with it, with 16 only 44."""
_VECTOR: Final = 16
"""Floats of the widest vector."""
DENSE_BUCKET: Final = 32
"""Rows of a network with dense layers come in multiples of it: `sigmoid` treats the last elements of an array that
does not fill its vectors with other code."""
GRU_BUCKET: Final = 4
"""Rows of a network without: fewer than four use matrix-vector kernels."""

_ACTIVATIONS: Final[dict[Activation, InPlace | None]] = {
    "none": None,
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "gelu": torch.ops.aten.gelu_,
    "silu": partial(functional.silu, inplace=True),
    "elu": partial(functional.elu, inplace=True),
    "leaky_relu": partial(functional.leaky_relu, inplace=True),
    "softplus": lambda rows: rows.copy_(functional.softplus(rows)),
    "softmax": lambda rows: rows.copy_(torch.softmax(rows, dim=1)),
}


class GruNetwork:
    """A `RecurrentModel`."""

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, GruDescription)
        self.model = model
        self.description: GruDescription = model.description
        self.fingerprint = model.fingerprint
        self.device = device
        self.state: StateSpec = self.description.state
        padded = bool(self.description.before or self.description.after)
        self.row_multiple = DENSE_BUCKET if padded else GRU_BUCKET
        self.multiply_adds = sum(math.prod(s) for s in self.description.tensor_shapes().values() if len(s) == 2)
        self._size = self.description.gru.hidden_size
        self._weights = self._padded_weights(WIDTH_MULTIPLE if padded else 1)
        self.kernel: GruKernel = "torch"
        """`select_step` decides."""
        self.may_step_by_hand = self._weights.width % _VECTOR == 0
        """Whether it is worth trying: in other widths, `sigmoid` over two gates at once ends its vectors elsewhere."""

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """Step by hand where that gave at least `rows` frames in each bucket the bits of `torch.gru`."""
        by_hand = BY_HAND if self.may_step_by_hand else ()
        same = (each for each in by_hand if all(self._is_same(each, bucket, rows) for bucket in buckets))
        self.kernel = next(same, "torch")

    def select_quickest(self) -> None:
        """Step by hand on the CPU."""
        self.kernel = BY_HAND[0] if self.may_step_by_hand and self.device.type == "cpu" else "torch"

    def bind(self, rows: int) -> GruStep:
        """The step of a batch of `rows`."""
        return GruStep(self._weights, rows, self._size, self.kernel)

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8]:
        """T frames of every row in one call of `torch.gru`; see `RecurrentModel.sequence`."""
        weights = self._weights
        steps, count, features = x.shape
        frames = torch.zeros(steps * count, weights.input_width)
        frames[:, :features] = torch.from_numpy(x).view(steps * count, features)
        h = torch.zeros(len(weights.layers), count, weights.width)
        h[:, :, : self._size] = torch.from_numpy(self.state.unpack(state)["h"].copy()).transpose(0, 1)
        rows = _apply(weights.before, frames.to(self.device))
        y, after = weights.gru(rows.view(steps, count, -1), h.to(self.device))
        y = _apply(weights.after, y.view(steps * count, -1)).view(steps, count, -1)
        outputs = y[:, :, : self.description.outputs].cpu().contiguous().numpy()
        return outputs, self.state.pack({"h": after.transpose(0, 1)[:, :, : self._size].cpu().numpy()})

    def reference(self, dtype: type[np.floating[Any]]) -> GruReference:
        """The equations in numpy."""
        weights = {name: tensor.numpy() for name, tensor in self.model.weights.items()}
        return GruReference(self.description.as_json(), weights, dtype)

    def _is_same(self, kernel: GruKernel, bucket: int, rows: int) -> bool:
        generator = torch.Generator().manual_seed(2)
        steps = [GruStep(self._weights, bucket, self._size, each) for each in ("torch", kernel)]
        features = self.description.features
        for _ in range(0, rows, bucket):
            x = torch.randn(bucket, features, generator=generator)
            x *= torch.tensor([0.1, 1, 1, 5])[torch.randint(4, (bucket, 1), generator=generator)]
            h = torch.rand(bucket, len(self._weights.layers), self._size, generator=generator) * 2 - 1
            h *= torch.tensor([0, 0.1, 1, 1])[torch.randint(4, (bucket, 1, 1), generator=generator)]
            for step in steps:
                step.x[:, :features].copy_(x)
                step.state["h"].copy_(h)
                step.run()
            plain, by_hand = steps
            for one, other in ((plain.y, by_hand.y), (plain.h, by_hand.h)):
                if not torch.equal(one.view(torch.int32), other.view(torch.int32)):
                    return False
        return True

    def _padded_weights(self, multiple: int) -> GruWeights:
        description, given = self.description, self.model.weights
        input_width, width = _up(description.features, multiple), _up(self._size, multiple)
        gru = torch.nn.GRU(
            _up(description.gru_input_size, multiple),
            width,
            description.gru.num_layers,
            bias=description.gru.bias,
            device=self.device,
        ).requires_grad_(False)
        for name, parameter in gru.named_parameters():
            parameter.copy_(_pad_gates(given[f"gru.{name}"], self._size, parameter.shape))
        flat: list[torch.Tensor] = list(gru.parameters())
        each = len(flat) // description.gru.num_layers
        layers = []
        for first in range(0, len(flat), each):
            input_weight, state_weight, *biases = flat[first : first + each]
            input_bias, state_bias = biases or (None, None)
            layers.append(LayerWeights(input_weight.t(), state_weight.t(), input_bias, state_bias))
        return GruWeights(
            before=self._dense("before", description.before, input_width),
            layers=layers,
            flat=flat,
            after=self._dense("after", description.after, width),
            input_width=input_width,
            width=width,
            device=self.device,
        )

    def _dense(self, place: str, layers: Sequence[DenseLayer], inputs: int) -> list[DenseWeights]:
        built = []
        for index, layer in enumerate(layers):
            size = _up(layer.size, WIDTH_MULTIPLE)
            weight = _pad(self.model.weights[f"{place}.{index}.weight"], (size, inputs)).to(self.device)
            bias = torch.zeros(size)
            if layer.bias:
                bias = _pad(self.model.weights[f"{place}.{index}.bias"], (size,))
            if layer.activation == "softmax":
                bias[layer.size :] = -math.inf  # so that padded units take no share
            built.append(DenseWeights(weight.t(), bias.to(self.device), _ACTIVATIONS[layer.activation]))
            inputs = size
        return built


def _apply(layers: Sequence[DenseWeights], rows: torch.Tensor) -> torch.Tensor:
    """Dense layers on rows [R, width], contiguous."""
    for layer in layers:
        rows = torch.addmm(layer.bias, rows, layer.weight)
        if layer.activate is not None:
            layer.activate(rows)
    return rows


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    padded = torch.zeros(shape, dtype=torch.float32)
    padded[tuple(slice(extent) for extent in tensor.shape)] = tensor
    return padded


def _pad_gates(tensor: torch.Tensor, hidden: int, shape: Sequence[int]) -> torch.Tensor:
    """A GRU tensor [3 · hidden, …] padded to `shape`, each of its three gates by itself."""
    rows, *columns = shape
    return _pad(tensor.view(3, hidden, *tensor.shape[1:]), (3, rows // 3, *columns)).flatten(0, 1)
