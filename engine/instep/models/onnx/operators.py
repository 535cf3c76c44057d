"""ONNX's operators expressed in torch's, at one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from instep.models.portable.form import DTYPES

if TYPE_CHECKING:
    from onnx import NodeProto

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Tensor | Array | None
"""A tensor depends on the frame or the state, an array does not; None is an omitted optional input."""
Results: TypeAlias = Tensor | Sequence[Tensor]

_MOST_PARTS: Final = 16
"""Elements at constant positions are copied in up to this many runs; more are picked by index."""


class UnservedOperator(Exception):
    """Raised with the reason that a node cannot be served."""


class OnnxNode:
    """A node with its attributes and the values of its inputs.

    Args:
        proto: as it is in the graph.
        opset: the version of ONNX's operators.
        values: of its inputs.
        tensor_of: the tensor of a constant, by name and values.
    """

    def __init__(
        self, proto: NodeProto, opset: int, values: Sequence[Value], tensor_of: Callable[[str, Array], Tensor]
    ) -> None:
        from onnx import helper

        self.proto, self.opset, self.values, self._tensor_of = proto, opset, values, tensor_of
        self.attributes = {each.name: helper.get_attribute_value(each) for each in proto.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def refuse(self, *names: str) -> None:
        """Refuse attributes that have a value other than none or zero."""
        for name in names:
            if (value := self.get(name)) and value != "none":
                raise UnservedOperator(f"its {name} is {value!r:.80}, which has no portable form")

    def value(self, at: int) -> Value:
        """An input, or None if it is omitted."""
        return self.values[at] if at < len(self.values) else None

    def given(self, at: int) -> Tensor | Array:
        """A required input."""
        value = self.value(at)
        if value is None:
            raise UnservedOperator(f"it has no input {at}")
        return value

    def tensor(self, at: int) -> Tensor:
        """A required input, as a tensor."""
        value = self.given(at)
        return self._tensor_of(self.proto.input[at], value) if isinstance(value, np.ndarray) else value

    def optional(self, at: int) -> Tensor | None:
        """An optional input, as a tensor."""
        return None if self.value(at) is None else self.tensor(at)

    def array(self, at: int) -> Array:
        """A required input that may not depend on the frame or the state."""
        value = self.given(at)
        if isinstance(value, Tensor):
            raise UnservedOperator(f"its input {self.proto.input[at]!r:.80} depends on the frame or the state")
        return value

    def ints(self, name: str, at: int) -> list[int] | None:
        """Integers from an input or, in older versions of the operator, an attribute."""
        values = self.get(name) if self.value(at) is None else np.ravel(self.array(at))
        return None if values is None else [int(each) for each in values]

    def number(self, name: str, at: int) -> float | None:
        """A number from an input or, in older versions of the operator, an attribute."""
        value = self.get(name) if self.value(at) is None else self.array(at)
        return None if value is None else np.asarray(value).item()

    def constant(self, what: str, values: Array) -> Tensor:
        """A constant that only this node uses."""
        return self._tensor_of(f"{next(filter(None, self.proto.output))}.{what}", values)

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.tensor(0)

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs."""
        return [self.tensor(at) for at in range(len(self.values))]


def _unchanged(node: OnnxNode) -> Tensor:
    if node.value(2) is not None and node.array(2).any():  # of Dropout
        raise UnservedOperator("it is in training mode; call eval() on the module and export it again")
    return node.x


def _div(node: OnnxNode) -> Tensor:
    a, b = node.tensors
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(node: OnnxNode) -> Tensor:
    exponent = node.value(1)
    if not isinstance(exponent, np.ndarray) or exponent.size != 1:
        return torch.pow(node.x, node.tensor(1)).to(node.x.dtype)
    number = float(exponent.item())
    power = torch.pow(node.x, int(number) if number.is_integer() else number).to(node.x.dtype)
    return power.reshape(np.broadcast_shapes(power.shape, exponent.shape))


def _mod(node: OnnxNode) -> Tensor:
    return (torch.fmod if node.get("fmod") else torch.remainder)(*node.tensors)


def _clip(node: OnnxNode) -> Tensor:
    low, high = node.number("min", 1), node.number("max", 2)
    return node.x if low is None and high is None else torch.clamp(node.x, low, high)


def _prelu(node: OnnxNode) -> Tensor:
    x, slope = node.tensors
    return torch.where(x > 0, x, slope * x)


def _cast(node: OnnxNode) -> Tensor:
    from onnx import helper

    name = helper.tensor_dtype_to_np_dtype(node.get("to")).name
    if name not in DTYPES:
        raise UnservedOperator(f"it gives {name}, and only {', '.join(DTYPES)} can be served")
    return node.x.to(getattr(torch, name))


def _softmax(node: OnnxNode, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    if node.opset >= 13:
        return function(node.x, node.get("axis", -1))
    return function(_flatten(node), 1).reshape(node.x.shape)


def _flatten(node: OnnxNode) -> Tensor:
    shape, axis = node.x.shape, node.get("axis", 1)
    return node.x.reshape(math.prod(shape[:axis]), math.prod(shape[axis:]))


def _conv(node: OnnxNode) -> Tensor:
    w = node.tensor(1)
    strides, dilations, pads = _window(node, w.shape[2:])
    x, zeros = _padded(node.x, pads), [0] * len(pads)
    return torch.convolution(x, w, node.optional(2), strides, zeros, dilations, False, zeros, node.get("group", 1))


def _conv_transpose(node: OnnxNode) -> Tensor:
    w = node.tensor(1)
    if "output_shape" in node.attributes or node.get("auto_pad", "NOTSET").startswith("SAME"):
        raise UnservedOperator("its shape is given in place of its padding; export it with pads and output_padding")
    strides, dilations, pads = _window(node, w.shape[2:])
    zeros = [0] * len(pads)
    more = node.get("output_padding", zeros)
    y = torch.convolution(node.x, w, node.optional(2), strides, zeros, dilations, True, more, node.get("group", 1))
    for dim, (before, after) in enumerate(pads, 2):
        y = y.narrow(dim, before, y.shape[dim] - before - after)
    return y


def _window(node: OnnxNode, kernel: Sequence[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    dims, auto = len(kernel), node.get("auto_pad", "NOTSET")
    strides, dilations = node.get("strides", [1] * dims), node.get("dilations", [1] * dims)
    if not auto.startswith("SAME"):
        pads = node.get("pads", [0] * 2 * dims) if auto == "NOTSET" else [0] * 2 * dims
        return strides, dilations, list(zip(pads[:dims], pads[dims:], strict=True))
    found = []
    for n, size, stride, dilation in zip(node.x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-n // stride) - 1) * stride + dilation * (size - 1) + 1 - n, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return strides, dilations, found


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _pool(node: OnnxNode) -> Tensor:
    kernel, is_max = node.get("kernel_shape"), node.proto.op_type == "MaxPool"
    strides, dilations, pads = _window(node, kernel)
    if any(map(any, pads)) and not is_max and not node.get("count_include_pad"):
        raise UnservedOperator("its averages leave out the padding: pad before it")
    x, more = _padded(node.x, pads, -math.inf if is_max else 0.0), {"dilation": dilations} if is_max else {}
    function = getattr(F, f"{'max' if is_max else 'avg'}_pool{len(kernel)}d")
    return function(x, kernel, strides, ceil_mode=bool(node.get("ceil_mode", 0)), **more)  # type: ignore[no-any-return]


def _gemm(node: OnnxNode) -> Tensor:
    a, b, c = node.x, node.tensor(1), node.optional(2)
    a, b = a.t() if node.get("transA") else a, b.t() if node.get("transB") else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if c is not None and alpha == beta == 1:
        return torch.addmm(c, a, b)
    y = a @ b if alpha == 1 else alpha * (a @ b)
    return y if c is None else y + beta * c


def _layer_norm(node: OnnxNode) -> Tensor:
    y = F.layer_norm(node.x, node.x.shape[node.get("axis", -1) :], eps=node.get("epsilon", 1e-5)) * node.tensor(1)
    shift = node.optional(2)
    return y if shift is None else y + shift


def _group_norm(node: OnnxNode) -> Tensor:
    """Scale and shift have one value for each group before opset 21, and one for each channel since."""
    x, scale, shift = node.tensors
    parts = F.group_norm(x, node.get("num_groups"), eps=node.get("epsilon", 1e-5)).reshape(x.shape[0], len(scale), -1)
    return (parts * scale[:, None] + shift[:, None]).reshape(x.shape)


def _batch_norm(node: OnnxNode) -> Tensor:
    node.refuse("training_mode")
    x, scale, shift, mean, variance = node.tensors
    return F.batch_norm(x, mean, variance, scale, shift, eps=node.get("epsilon", 1e-5))


def _reduced(node: OnnxNode, function: Callable[[Tensor, list[int], bool], Tensor]) -> Tensor:
    x, axes = node.x, node.ints("axes", 1)
    if not axes and node.get("noop_with_empty_axes"):
        return x
    dims = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
    return function(x, dims, bool(node.get("keepdims", 1)))


def _extreme(node: OnnxNode, function: Callable[[Tensor, int, bool], Tensor]) -> Tensor:
    node.refuse("select_last_index")
    return function(node.x, node.get("axis", 0), bool(node.get("keepdims", 1)))


def _cumsum(node: OnnxNode) -> Tensor:
    node.refuse("exclusive", "reverse")
    return node.x.cumsum(int(node.array(1).item()), dtype=node.x.dtype)


def _slice(node: OnnxNode) -> Tensor:
    x, starts, ends = node.x, node.ints("starts", 1) or [], node.ints("ends", 2) or []
    axes, steps = node.ints("axes", 3) or range(len(starts)), node.ints("steps", 4) or [1] * len(starts)
    for start, end, dim, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[dim])[start:end:step]
        first = places.start
        if step < 0:
            x, first = x.flip(dim), x.shape[dim] - 1 - first
        x = torch.ops.aten.slice.Tensor(x, dim, first, first + len(places) * abs(step), abs(step))
    return x


def _split(node: OnnxNode) -> Sequence[Tensor]:
    x, dim, parts = node.x, node.get("axis", 0), len(node.proto.output)
    return torch.split(x, node.ints("split", 1) or -(-x.shape[dim] // parts), dim)


def _squeeze(node: OnnxNode) -> Tensor:
    axes = node.ints("axes", 1)
    return node.x.squeeze([dim for dim, n in enumerate(node.x.shape) if n == 1] if axes is None else axes)


def _unsqueeze(node: OnnxNode) -> Tensor:
    x, axes = node.x, node.ints("axes", 1) or []
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _reshape(node: OnnxNode) -> Tensor:
    shape = node.ints("shape", 1) or []
    kept = [node.x.shape[at] if n == 0 and not node.get("allowzero") else n for at, n in enumerate(shape)]
    return node.x.reshape(kept)


def _expand(node: OnnxNode) -> Tensor:
    return node.x.expand(np.broadcast_shapes(node.x.shape, tuple(node.ints("shape", 1) or ())))


def _pad(node: OnnxNode) -> Tensor:
    x, pads, mode = node.x, node.ints("pads", 1) or [], node.get("mode", "constant")
    dims = node.ints("axes", 3) or range(len(pads) // 2)
    pairs = {dim % x.dim(): (pads[at], pads[at + len(dims)]) for at, dim in enumerate(dims)}
    if mode == "constant":
        return _padded(x, [pairs.get(dim, (0, 0)) for dim in range(x.dim())], node.number("value", 2) or 0.0)
    for dim, pair in pairs.items():
        if any(pair):
            x = _picked(node, x, dim, np.pad(np.arange(x.shape[dim]), pair, mode))
    return x


def _picked(node: OnnxNode, x: Tensor, dim: int, places: Array) -> Tensor:
    runs = np.split(places, 1 + np.flatnonzero(np.diff(places) != 1))
    if len(runs) > _MOST_PARTS or not len(places):
        return x.index_select(dim, node.constant("places", places.astype(np.int64)))
    found = [x.narrow(dim, int(run[0]), len(run)) for run in runs]
    return torch.cat(found, dim) if len(found) > 1 else found[0]


def _gather(node: OnnxNode) -> Tensor:
    x, index = node.x, node.given(1)
    dim = node.get("axis", 0) % x.dim()
    if isinstance(index, np.ndarray):
        found = _picked(node, x, dim, np.ravel(index) % x.shape[dim])
    else:
        found = x.index_select(dim, index.reshape(-1).to(torch.int64))
    return found.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])


def _gather_elements(node: OnnxNode) -> Tensor:
    return torch.gather(node.x, node.get("axis", 0), node.tensor(1).to(torch.int64))


def _scatter_elements(node: OnnxNode) -> Tensor:
    node.refuse("reduction")
    x, index, updates = node.tensors
    return torch.scatter(x, node.get("axis", 0), index.to(torch.int64), updates)


def _gather_nd(node: OnnxNode) -> Tensor:
    node.refuse("batch_dims")
    return node.x[node.tensor(1).unbind(-1)]


def _scatter_nd(node: OnnxNode) -> Tensor:
    node.refuse("reduction")
    x, index, updates = node.tensors
    return x.index_put(index.unbind(-1), updates)


_GATES: Final = {"GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1), "RNN": (0,)}
"""Where ONNX has each of torch's gates (GRU: reset, update, new; LSTM: input, forget, cell, output)."""
_LAYERS: Final[Mapping[str, tuple[list[str], Callable[..., tuple[Tensor, ...]]]]] = {
    "GRU": (["sigmoid", "tanh"], torch.gru),
    "LSTM": (["sigmoid", "tanh", "tanh"], torch.lstm),
    "RNN": (["tanh"], torch.rnn_tanh),
    "RNN relu": (["relu"], torch.rnn_relu),
}
"""The default activations, and torch's function."""


def _recurrent(node: OnnxNode) -> Sequence[Tensor]:
    """Y [timesteps, directions, batch, hidden], and the last states [directions, batch, hidden]."""
    op, x, w, r = node.proto.op_type, node.x, node.array(1), node.array(2)
    halves = [] if node.value(3) is None else np.split(node.array(3), 2, 1)
    directions, hidden = len(r), r.shape[-1]
    given = [each.decode().lower() for each in node.get("activations", [])]
    usual, function = _LAYERS["RNN relu" if given[:1] == ["relu"] else op]
    _check_recurrent(node, len(x), given not in ([], usual * directions))
    params = [
        node.constant(f"{name}.{at}", np.concatenate(each[at].reshape(-1, hidden, *each.shape[2:])[list(_GATES[op])]))
        for at in range(directions)
        for name, each in zip(("W", "R", "Wb", "Rb"), (w, r, *halves), strict=False)
    ]
    starts = [node.optional(5), node.optional(6)][: 2 if op == "LSTM" else 1]
    state = [x.new_zeros(directions, x.shape[1], hidden) if each is None else each for each in starts]
    is_backwards = node.get("direction") == "reverse"
    y, *finals = function(
        x.flip(0) if is_backwards else x, state if len(state) > 1 else state[0], params, bool(halves), 1, 0.0, False,
        directions == 2, False,
    )  # fmt: skip
    y = y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2)
    return [y.flip(0) if is_backwards else y, *finals]


def _check_recurrent(node: OnnxNode, timesteps: int, is_unusual: bool) -> None:
    node.refuse("clip", "input_forget", "layout")
    if is_unusual:
        raise UnservedOperator("it has other than the usual activations")
    if node.value(7) is not None:
        raise UnservedOperator("it has peepholes: train it without them")
    if node.proto.op_type == "GRU" and not node.get("linear_before_reset"):
        raise UnservedOperator("its reset gate comes before the product with the state: train it with reset_after=True")
    if node.value(4) is not None and (node.array(4) != timesteps).any():
        raise UnservedOperator("its sequences have different lengths")


_NAMED: Final = (
    "Abs Add Ceil Cos Erf Exp Floor Log MatMul Mul Neg Reciprocal Relu Round Sigmoid Sign Sin Sqrt Sub Tanh Where"
)
_MAPS: Final[Mapping[str, Callable[..., Tensor]]] = {
    **{name: getattr(torch, name.lower()) for name in _NAMED.split()},
    **{name: getattr(torch, f"logical_{name.lower()}") for name in ("And", "Not", "Or", "Xor")},
    **{name: getattr(F, name.lower()) for name in ("HardSwish", "Mish", "Softplus", "Softsign")},
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
"""Operators that are a single function of torch."""
_VARIADIC: Final = {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}
_REDUCTIONS: Final[Mapping[str, Callable[[Tensor, list[int], bool], Tensor]]] = {
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keep, dtype=x.dtype),
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keep),
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL2": lambda x, dims, keep: (x * x).sum(dims, keep).sqrt(),
    "ReduceSumSquare": lambda x, dims, keep: (x * x).sum(dims, keep, dtype=x.dtype),
}
OPERATORS: Final[Mapping[str, Callable[[OnnxNode], Results]]] = {
    **{name: partial(lambda node, function: function(*node.tensors), function=each) for name, each in _MAPS.items()},
    **{
        name: partial(lambda node, function: reduce(function, node.tensors), function=f)
        for name, f in _VARIADIC.items()
    },
    **{name: partial(_reduced, function=each) for name, each in _REDUCTIONS.items()},
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("Dropout", "Identity"), _unchanged),
    "ArgMax": partial(_extreme, function=torch.argmax),
    "ArgMin": partial(_extreme, function=torch.argmin),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda node: torch.cat(node.tensors, node.get("axis")),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumsum,
    "Div": _div,
    "Einsum": lambda node: torch.einsum(node.get("equation"), *node.tensors),
    "Elu": lambda node: F.elu(node.x, node.get("alpha", 1.0)),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": lambda node: F.gelu(node.x, approximate=node.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node: node.x.mean(list(range(2, node.x.dim())), True),
    "GlobalMaxPool": lambda node: node.x.amax(list(range(2, node.x.dim())), True),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda node: torch.clamp(node.get("alpha", 0.2) * node.x + node.get("beta", 0.5), 0.0, 1.0),
    "InstanceNormalization": lambda node: F.group_norm(
        node.x, node.x.shape[1], node.tensor(1), node.tensor(2), node.get("epsilon", 1e-5)
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node: F.leaky_relu(node.x, node.get("alpha", 0.01)),
    "LogSoftmax": partial(_softmax, function=F.log_softmax),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _pow,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Softmax": partial(_softmax, function=F.softmax),
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda node: node.x.repeat(node.ints("repeats", 1) or []),
    "Transpose": lambda node: node.x.permute(node.get("perm", list(range(node.x.dim()))[::-1])),
    "Unsqueeze": _unsqueeze,
}
