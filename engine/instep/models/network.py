"""The network that is stepped: dense layers, the GRU, dense layers, on one device.

Bits are part of the contract. The GRU is `torch.gru`, the very operation behind `nn.GRU`, or, one frame at a time and
where certification found the same bits, `FusedGru`. A network without dense layers is not touched: its bits are those
of the user's own `nn.GRU`. With dense layers, two things would make a row's bits depend on how many rows are beside it,
and both are designed out: every dense layer is one `addmm` over contiguous 2-D rows, stepping and over a whole sequence
alike, and all widths are padded with zeros to multiples of 16, so that the same matrix kernels serve every number of
rows. A padded hidden unit has zero weights and biases and stays exactly 0. (Where a dense layer overflows to infinity,
0 · inf makes its padded neighbours NaN: values beyond float32 are not promised.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch

from instep.models.description import Activation, DenseLayer
from instep.models.folder import Model
from instep.models.fused import FusedGru

WIDTH_MULTIPLE: Final = 16
"""Widths of a network with dense layers are multiples of it."""
DENSE_BUCKET: Final = 32
"""Rows of a network with dense layers come in multiples of it: `sigmoid` treats the last elements of an array that
does not fill its vectors with other code."""
GRU_BUCKET: Final = 4
"""Rows of a network without: fewer than four use matrix-vector kernels."""

_InPlace: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_ACTIVATIONS: Final[dict[Activation, _InPlace | None]] = {
    "none": None,
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}
_Dense: TypeAlias = tuple[torch.Tensor, torch.Tensor, _InPlace | None]


class Network:
    """A model on a device, for inference only; it holds no stream's state and may be used by one thread at a time.

    Call `advance`, `step` and `sequence` under `torch.inference_mode()` for speed; they build no graph without it
    either. Padded columns of frames and states (those beyond `features` and `state_size`) must be zero when given, and
    come back zero in states; those of outputs (beyond `outputs`) mean nothing.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        description = model.description
        padded = bool(description.before or description.after)
        multiple = WIDTH_MULTIPLE if padded else 1
        self.model = model
        self.description = description
        self.device = device
        self.features = description.features
        self.outputs = description.outputs
        self.state_layers = description.state_layers
        self.state_size = description.state_size
        self.input_width = _up(self.features, multiple)
        self.state_width = _up(self.state_size, multiple)
        self.output_width = _up(self.outputs, multiple)
        self.smallest_bucket = DENSE_BUCKET if padded else GRU_BUCKET
        """Rows of a step or sequence should be a multiple of it; with others, bits may differ."""
        gru = torch.nn.GRU(
            _up(description.gru_input_size, multiple),
            self.state_width,
            self.state_layers,
            bias=description.gru.bias,
            device=device,
        ).requires_grad_(False)
        for name, parameter in gru.named_parameters():
            parameter.copy_(_pad_gates(model.weights[f"gru.{name}"], self.state_size, parameter.shape))
        self._gru_weights: list[torch.Tensor] = list(gru.parameters())
        self.uses_fused = False
        """Whether `advance` uses `FusedGru`. Certification finds out whether its bits are the same, and sets it."""
        self.may_fuse = self.state_width % WIDTH_MULTIPLE == 0
        """Whether it is worth trying: in other widths, `sigmoid` over two gates at once ends its vectors elsewhere."""
        self._fused = FusedGru(self._gru_weights, self.state_layers, bias=description.gru.bias)
        self._before = self._dense("before", description.before, self.input_width)
        self._after = self._dense("after", description.after, self.state_width)

    def advance(
        self, x: torch.Tensor, h: torch.Tensor, of_layers: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One frame of every row, in place.

        Args:
            x: frames, float32 [B, input_width], contiguous.
            h: states, float32 [state_layers, B, state_width], contiguous; changed to those after the frame.
            of_layers: `h.unbind()`, where it is at hand.

        Returns:
            Outputs [B, output_width]; without dense layers behind the GRU, they are `h[-1]` itself.
        """
        x = _apply(self._before, x)
        if self.uses_fused:
            y = self._fused.advance(x, of_layers or h.unbind())
        else:
            _, states = self._gru(x.unsqueeze(0), h)
            y = h.copy_(states)[-1]
        return _apply(self._after, y)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `advance`, but `h` is not changed: outputs, and the states after the frame."""
        states = h.clone()
        return self.advance(x, states).clone(), states

    def sequence(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T frames of every row in one call.

        Args:
            x: frames, float32 [T, R, input_width], contiguous.
            h: states, float32 [state_layers, R, state_width], contiguous; not changed.

        Returns:
            Outputs [T, R, output_width] and the states after the last frame, as `h`.
        """
        steps, count, width = x.shape
        rows = _apply(self._before, x.view(steps * count, width))
        y, h = self._gru(rows.view(steps, count, -1), h)
        return _apply(self._after, y.view(steps * count, -1)).view(steps, count, -1), h

    def _gru(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # nn.GRU.forward ends in this call; its checks and bookkeeping cost as much again at small batches.
        return torch.gru(
            x, h, self._gru_weights, self.description.gru.bias, self.state_layers, 0.0, False, False, False
        )

    def _dense(self, place: str, layers: Sequence[DenseLayer], inputs: int) -> list[_Dense]:
        built: list[_Dense] = []
        for index, layer in enumerate(layers):
            size = _up(layer.size, WIDTH_MULTIPLE)
            weight = _pad(self.model.weights[f"{place}.{index}.weight"], (size, inputs)).to(self.device)
            bias = torch.zeros(size)
            if layer.bias:
                bias = _pad(self.model.weights[f"{place}.{index}.bias"], (size,))
            built.append((weight.t(), bias.to(self.device), _ACTIVATIONS[layer.activation]))
            inputs = size
        return built


def _apply(layers: list[_Dense], rows: torch.Tensor) -> torch.Tensor:
    """Dense layers on rows [R, width], contiguous."""
    for weight, bias, activate in layers:
        rows = torch.addmm(bias, rows, weight)
        if activate is not None:
            activate(rows)
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
