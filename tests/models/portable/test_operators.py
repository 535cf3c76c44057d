"""Every operator that a step may call: in normal form it gives what torch gives, or it is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from instep.models.module.operators import ALLOWED
from instep.models.portable.definition import Definition
from instep.models.portable.trace import trace

aten: Final = torch.ops.aten
Case: TypeAlias = Callable[[Tensor, Tensor], Any]


def constant(*shape: int, seed: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 0.9, shape).astype(np.float32))


def places(y: Tensor, count: int = 3) -> Tensor:
    """Whole numbers below `count` that depend on the frame."""
    return (y.abs() * count).long() % count


def is_high(x: Tensor) -> Tensor:
    return x > 0.5


def unary(name: str) -> Case:
    return lambda x, y: getattr(aten, name)(x)


def binary(name: str) -> Case:
    return lambda x, y: getattr(aten, name)(x, y)


def of_bools(name: str) -> Case:
    return lambda x, y: getattr(aten, name)(is_high(x), is_high(y))


def of_places(name: str) -> Case:
    return lambda x, y: getattr(aten, name)(places(x, 9) - 4, places(y, 4) + 1)


UNARY: Final = frozenset(
    """
    abs acos  asin  atan  ceil cos cosh deg2rad erf erfc exp exp2 expm1 fix floor frac isfinite isinf
    isnan log log10 log1p log2 logical_not logit nan_to_num neg negative rad2deg reciprocal round rsqrt sgn sigmoid
    sign sin sinc  special_expit sqrt square tan tanh trunc celu elu gelu glu hardshrink hardsigmoid hardswish
    hardtanh leaky_relu log_sigmoid mish relu relu6 selu silu softplus softshrink
    """.split()  # noqa: SIM905
)
BINARY: Final = frozenset(
    """
    add atan2 copysign div divide eq floor_divide   fmod ge greater gt heaviside hypot isclose le less
    logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul multiply ne pow remainder rsub
    special_xlog1py sub subtract true_divide xlogy
    """.split()  # noqa: SIM905
)
OF_BOOLS: Final = frozenset(
    """
    __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor eq ne lt
    """.split()  # noqa: SIM905
)
OF_INTEGERS: Final = frozenset(
    """
    __and__ __or__ __xor__ add bitwise_and bitwise_or bitwise_xor div floor_divide fmod maximum minimum mul remainder
    sub eq lt
    """.split()  # noqa: SIM905
)

LAST: Final = (False, False, True)
"""Of a recurrent layer: it is not trained, runs forward only, and its batch comes first."""

# A second operator in a case only makes an argument of the kind that the first one takes.
CASES: Final[dict[str, Sequence[Case]]] = {
    "addcdiv": [lambda x, y: torch.addcdiv(x, y, y + 4, value=0.5)],
    "addcmul": [
        lambda x, y: torch.addcmul(x, y, y),
        lambda x, y: torch.addcmul(x, y, x, value=0.3),
        lambda x, y: torch.addcmul(places(x), places(y), places(x)),
    ],
    "add": [lambda x, y: torch.add(x, y, alpha=3), lambda x, y: x.double() + y, lambda x, y: places(x) + y],
    "sub": [lambda x, y: torch.sub(x, y, alpha=2), lambda x, y: 1 - x],
    "bitwise_not": [lambda x, y: torch.bitwise_not(is_high(x)), lambda x, y: ~places(x)],
    "clamp": [lambda x, y: x.clamp(0.2, 0.6), lambda x, y: x.clamp(max=y), lambda x, y: places(x, 9).clamp(2, 5)],
    "clamp_max": [lambda x, y: x.clamp_max(0.6)],
    "clamp_min": [lambda x, y: x.clamp_min(0.6)],
    "div": [
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        lambda x, y: torch.div(x, y, rounding_mode="trunc"),
        lambda x, y: torch.div(places(x, 9) - 4, places(y) + 1, rounding_mode="floor"),
        lambda x, y: 2 / x,
    ],
    "remainder": [lambda x, y: x % -0.3, lambda x, y: (places(x, 9) - 4) % 3, lambda x, y: (places(x, 9) - 4) % -3],
    "fmod": [lambda x, y: torch.fmod(places(x, 9) - 4, 3)],
    "lerp": [lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: torch.lerp(x, y, y)],
    "masked_fill": [lambda x, y: x.masked_fill(is_high(y), -math.inf), lambda x, y: x.masked_fill(y > 0.5, x[0, 0, 0])],
    "nan_to_num": [lambda x, y: torch.nan_to_num(torch.log(x - 0.5), 1.0, 2.0, 3.0)],
    "pow": [
        *(lambda x, y, power=power: x**power for power in (0, 1, 2, 3, 7, 8, -1, -2, 0.5, -0.5, 1.3, 11, -9)),
        lambda x, y: 2.5**x,
        lambda x, y: places(x) ** 3,
    ],
    "where": [
        lambda x, y: torch.where(is_high(x), x, y),
        lambda x, y: torch.where(is_high(x), 1.0, y),
        lambda x, y: torch.where(torch.arange(6) > 2, x, y),
    ],
    "logit": [lambda x, y: torch.logit(x, 0.3)],
    "isclose": [lambda x, y: torch.isclose(x, x * 1.000001), lambda x, y: torch.isclose(places(x), places(y))],
    # Activations and layers.
    "gelu": [lambda x, y: F.gelu(x, approximate="tanh")],
    "glu": [lambda x, y: F.glu(x, 1)],
    "elu": [lambda x, y: F.elu(x, 0.7)],
    "softplus": [lambda x, y: F.softplus(x * 40, 2.0, 5.0)],
    "softmax": [lambda x, y: torch.softmax(x, 1), lambda x, y: torch.softmax(places(x), 1, torch.float32)],
    "log_softmax": [lambda x, y: torch.log_softmax(x, -1)],
    "prelu": [lambda x, y: F.prelu(x - 0.5, constant(1)), lambda x, y: F.prelu(x - 0.5, constant(4))],
    "threshold": [lambda x, y: F.threshold(x, 0.5, 0.1)],
    "addmm": [
        lambda x, y: torch.addmm(y[0, 0, :4], x[0], y[0].t()),
        lambda x, y: torch.addmm(y[0, :, :4], x[0], y[0].t(), beta=0.5, alpha=2),
    ],
    "addmv": [lambda x, y: torch.addmv(y[0, :, 0], x[0], y[0, 0])],
    "baddbmm": [lambda x, y: torch.baddbmm(y[:, :, :4], x, y.transpose(1, 2))],
    "bmm": [lambda x, y: torch.bmm(x, y.transpose(1, 2))],
    "conv1d": [
        lambda x, y: F.conv1d(x, constant(3, 4, 3), constant(3)),
        lambda x, y: F.conv1d(x, constant(8, 2, 2), None, 2, 1, 2, 2),
        lambda x, y: F.conv1d(torch.cat([x, y, x]), constant(3, 4, 3), padding="same"),
    ],
    "conv2d": [
        lambda x, y: F.conv2d(x[:, None], constant(3, 1, 2, 3), constant(3), (2, 1), (1, 0)),
        lambda x, y: F.conv2d(x[:, :, None], constant(4, 2, 1, 3), groups=2),
    ],
    "conv3d": [lambda x, y: F.conv3d(x[:, :, None, None], constant(3, 4, 1, 1, 3), padding=1)],
    "conv_transpose1d": [
        lambda x, y: F.conv_transpose1d(x, constant(4, 3, 3)),
        lambda x, y: F.conv_transpose1d(x, constant(4, 2, 3), constant(4), 2, 1, 1, 2, 2),
    ],
    "convolution": [
        lambda x, y: torch.convolution(x, constant(3, 4, 3), None, [1], [0], [1], False, [0], 1),
        lambda x, y: torch.convolution(x[:, None], constant(1, 3, 3, 3), None, [2, 2], [0, 1], [1, 1], True, [1, 0], 1),
    ],
    "dot": [lambda x, y: torch.dot(x[0, 0], y[0, 0])],
    "einsum": [lambda x, y: torch.einsum("bij,bkj->bik", x, y), lambda x, y: torch.einsum("bij,bij->b", x, y)],
    "embedding": [lambda x, y: F.embedding(places(x), constant(5, 3))],
    "group_norm": [
        lambda x, y: F.group_norm(x, 2, constant(4), constant(4)),
        lambda x, y: F.group_norm(x[:, :, None], 4),
    ],
    "gru": [
        lambda x, y: torch.gru(x, constant(2, 1, 3), [*gates(3, 6, 3), *gates(3, 3, 3)], True, 2, 0.0, *LAST),
        lambda x, y: torch.gru(x, constant(2, 4, 3), gates(3, 6, 3)[:2] * 2, False, 1, 0.0, False, True, False),
    ],
    "gru_cell": [
        lambda x, y: torch.gru_cell(x[:, 0], y[:, 0], *gates(3, 6, 6)),
        lambda x, y: torch.gru_cell(x[:, 0], y[:, 0], *gates(3, 6, 6)[:2]),
    ],
    "batch_norm": [lambda x, y: F.batch_norm(x, y[0, :, 0], y[0, :, 1].abs(), constant(4), constant(4))],
    "instance_norm": [lambda x, y: F.instance_norm(x, weight=constant(4), bias=constant(4))],
    "_native_batch_norm_legit_no_training": [
        lambda x, y: aten._native_batch_norm_legit_no_training(
            x, constant(4), constant(4), y[0, :, 0], y[0, :, 1].abs(), 0.1, 1e-5
        )[0]
    ],
    "_native_batch_norm_legit": [
        lambda x, y: aten._native_batch_norm_legit.no_stats(x, constant(4), None, True, 0.1, 1e-5)[0]
    ],
    "copy": [lambda x, y: aten.copy(x, y[..., :1])],
    "fill": [lambda x, y: aten.fill(x, 0.5) + y],
    "_unsafe_view": [lambda x, y: aten._unsafe_view(x * y, [1, 24])],
    "inner": [lambda x, y: torch.inner(x, y)],
    "layer_norm": [
        lambda x, y: F.layer_norm(x, (6,), constant(6), constant(6)),
        lambda x, y: F.layer_norm(x, (4, 6), constant(4, 6)),
    ],
    "linear": [lambda x, y: F.linear(x, constant(5, 6), constant(5)), lambda x, y: F.linear(x[0, 0], constant(5, 6))],
    "linalg_norm": [lambda x, y: torch.linalg.norm(x, dim=-1), lambda x, y: torch.linalg.norm(x, 1, dim=-1)],
    "linalg_vecdot": [lambda x, y: torch.linalg.vecdot(x, y)],
    "linalg_vector_norm": [
        *(lambda x, y, order=order: torch.linalg.vector_norm(x, order, -1) for order in (0, 1, 2, 3, math.inf)),
        lambda x, y: torch.linalg.vector_norm(x, -math.inf, (1, 2)),
    ],
    "lstm": [
        lambda x, y: torch.lstm(
            x, [constant(2, 1, 3), constant(2, 1, 3)], [*gates(4, 6, 3), *gates(4, 3, 3)], True, 2, 0.0, *LAST
        ),
        lambda x, y: torch.lstm(
            x, [constant(1, 1, 2), constant(1, 1, 3)], [constant(12, 6), constant(12, 2), constant(12), constant(12),
            constant(2, 3)], True, 1, 0.0, *LAST
        ),
    ],
    "lstm_cell": [lambda x, y: torch.lstm_cell(x[:, 0], [y[:, 0], y[:, 1]], *gates(4, 6, 6))],
    "matmul": [
        lambda x, y: x @ y.transpose(1, 2),
        lambda x, y: x @ y[0, 0],
    ],
    "mm": [lambda x, y: x[0] @ y[0].t()],
    "mv": [lambda x, y: torch.mv(x[0], y[0, 0])],
    "outer": [lambda x, y: torch.outer(x[0, 0], y[0, 0])],
    "rms_norm": [lambda x, y: F.rms_norm(x, (6,), constant(6)), lambda x, y: F.rms_norm(x, (6,), None, 1e-3)],
    "rnn_relu": [lambda x, y: torch.rnn_relu(x, constant(1, 1, 3), gates(1, 6, 3), True, 1, 0.0, *LAST)],
    "rnn_relu_cell": [lambda x, y: torch.rnn_relu_cell(x[:, 0], y[:, 0], *gates(1, 6, 6))],
    "rnn_tanh": [lambda x, y: torch.rnn_tanh(x, constant(1, 1, 3), gates(1, 6, 3), True, 1, 0.0, *LAST)],
    "rnn_tanh_cell": [lambda x, y: torch.rnn_tanh_cell(x[:, 0], y[:, 0], *gates(1, 6, 6))],
    "scaled_dot_product_attention": [
        lambda x, y: F.scaled_dot_product_attention(x, y, y),
        lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
        lambda x, y: F.scaled_dot_product_attention(x, y, y, is_high(constant(4, 4)), scale=0.3),
        lambda x, y: F.scaled_dot_product_attention(x[:, :, None], y[:, :2, None], y[:, :2, None], enable_gqa=True),
    ],
    "cosine_similarity": [lambda x, y: F.cosine_similarity(x, y)],
    "norm": [lambda x, y: torch.norm(x, dim=-1), lambda x, y: aten.norm(x), lambda x, y: aten.norm(x, 1, [1], True)],
    "upsample_bilinear2d": [
        lambda x, y: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"),
        lambda x, y: F.interpolate(x[:, None], (7, 5), mode="bilinear", align_corners=True),
    ],
    "upsample_linear1d": [lambda x, y: F.interpolate(x, scale_factor=2, mode="linear")],
    "upsample_nearest1d": [lambda x, y: F.interpolate(x, scale_factor=2), lambda x, y: F.interpolate(x, 4)],
    "upsample_nearest2d": [lambda x, y: F.interpolate(x[:, None], scale_factor=2)],
    "_weight_norm": [lambda x, y: torch._weight_norm(x, y[:, :1, :1])],
    # Spectra.
    "fft_rfft": [
        *(lambda x, y, n=n: torch.view_as_real(torch.fft.rfft(x.flatten(), n)) for n in (1, 2, 3, 12, 15, 16, 24, 32)),
        lambda x, y: torch.fft.rfft(x, dim=1, norm="ortho").abs(),
        lambda x, y: torch.fft.rfft(x, norm="forward").unsqueeze(1)[..., 1:].real,
    ],
    "fft_irfft": [
        *(lambda x, y, n=n: torch.fft.irfft(torch.complex(x, y), n) for n in (8, 9, 10, 16)),
        lambda x, y: torch.fft.irfft(torch.fft.rfft(x, norm="ortho"), norm="ortho"),
        lambda x, y: torch.fft.irfft(torch.fft.rfft(x) * torch.complex(y[..., :4], x[..., :4])),
        lambda x, y: torch.fft.irfft((torch.fft.rfft(x) + torch.fft.rfft(y)) * y[..., :4] - torch.fft.rfft(y)),
    ],
    "fft_fft": [lambda x, y: torch.view_as_real(torch.fft.fft(x)), lambda x, y: torch.fft.fft(x, 8, dim=1).imag],
    "fft_ifft": [lambda x, y: torch.view_as_real(torch.fft.ifft(torch.complex(x, y), 8, dim=-2, norm="forward"))],
    "complex": [lambda x, y: torch.complex(x, y).abs()],
    "polar": [lambda x, y: torch.view_as_real(torch.polar(x, y))],
    "angle": [lambda x, y: torch.angle(torch.complex(x, y))],
    "real": [lambda x, y: torch.real(torch.complex(x, y))],
    "imag": [lambda x, y: torch.imag(torch.complex(x, y))],
    "view_as_complex": [lambda x, y: torch.view_as_complex(x.view(1, 4, 3, 2)).abs()],
    "view_as_real": [lambda x, y: torch.view_as_real(torch.complex(x, y))],
    # Reductions.
    "all": [lambda x, y: is_high(x).all(-1), lambda x, y: is_high(x).all(), lambda x, y: places(x).all(1, True)],
    "amax": [lambda x, y: x.amax(-1), lambda x, y: x.amax((1, 2), True), lambda x, y: is_high(x).amax(1)],
    "amin": [lambda x, y: x.amin(-1), lambda x, y: places(x, 9).amin(1)],
    "any": [lambda x, y: is_high(x).any(-1), lambda x, y: (x > 5).any(), lambda x, y: x.any(1)],
    "argmax": [lambda x, y: x.argmax(-1), lambda x, y: x.argmax(), lambda x, y: places(x).argmax(1, True)],
    "argmin": [lambda x, y: x.argmin(-1), lambda x, y: x.argmin(), lambda x, y: places(x).argmin(1, True)],
    "count_nonzero": [lambda x, y: places(x).count_nonzero(-1), lambda x, y: torch.relu(x).count_nonzero()],
    "cumprod": [lambda x, y: x.cumprod(-1)],
    "cumsum": [lambda x, y: x.cumsum(1), lambda x, y: places(x).cumsum(-1), lambda x, y: is_high(x).cumsum(-1)],
    "diff": [lambda x, y: x.diff(), lambda x, y: x.diff(n=2, dim=1)],
    "logsumexp": [lambda x, y: x.logsumexp(-1), lambda x, y: x.logsumexp((1, 2), True)],
    "max": [lambda x, y: x.max(-1), lambda x, y: x.max(), lambda x, y: torch.max(x, y)],
    "mean": [lambda x, y: x.mean(-1), lambda x, y: x.mean(), lambda x, y: x.mean((1, 2), True)],
    "min": [lambda x, y: x.min(-1), lambda x, y: x.min(), lambda x, y: torch.min(x, y)],
    "nansum": [lambda x, y: torch.log(x - 0.5).nansum(-1)],
    "prod": [lambda x, y: x.prod(-1), lambda x, y: x.prod(), lambda x, y: places(x).prod(1, True)],
    "std": [lambda x, y: x.std(-1), lambda x, y: x.std(1, correction=0), lambda x, y: x.std()],
    "std_mean": [lambda x, y: torch.std_mean(x, -1)],
    "sum": [
        lambda x, y: x.sum(-1),
        lambda x, y: places(x).sum((1, 2)),
    ],
    "var": [lambda x, y: x.var(-1), lambda x, y: x.var((1, 2), correction=0, keepdim=True)],
    "var_mean": [lambda x, y: torch.var_mean(x, 1)],
    "avg_pool1d": [
        lambda x, y: F.avg_pool1d(x, 2),
        lambda x, y: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True),
    ],
    "avg_pool2d": [
        lambda x, y: F.avg_pool2d(x, (1, 2)),
        lambda x, y: F.avg_pool2d(x[:, None], 3, 2, 1, True),
        lambda x, y: F.avg_pool2d(x[:, None], 2, 3, divisor_override=3),
    ],
    "adaptive_avg_pool1d": [lambda x, y: F.adaptive_avg_pool1d(x, 4)],
    "max_pool1d": [lambda x, y: F.max_pool1d(x, 2), lambda x, y: F.max_pool1d(x, 3, 2, 1, ceil_mode=True)],
    "max_pool2d": [lambda x, y: F.max_pool2d(x, 2), lambda x, y: F.max_pool2d(x[:, None], 2, 1, 1, (1, 2))],
    # Shapes.
    "broadcast_to": [lambda x, y: x[:, :1].broadcast_to(1, 4, 6)],
    "cat": [lambda x, y: torch.cat([x, y, x[:, :, :0], places(x)], 2), lambda x, y: torch.cat([torch.empty(0), x])],
    "chunk": [lambda x, y: x.chunk(3, 2)],
    "clone": [lambda x, y: x.transpose(1, 2).clone()],
    "concat": [lambda x, y: torch.concat([x, y], 1)],
    "constant_pad_nd": [
        lambda x, y: F.pad(x, [1, 2, 3, 0], value=0.5),
        lambda x, y: F.pad(x, [-1, 2, 1, -2]),
    ],
    "pad": [
        lambda x, y: F.pad(x, [1, 2], "reflect"),
        lambda x, y: F.pad(x, [1, 2], "replicate"),
        lambda x, y: F.pad(x, [1, 2], "circular"),
    ],
    "contiguous": [lambda x, y: x.transpose(1, 2).contiguous()],
    "diagonal": [lambda x, y: x.diagonal(1, 1, 2)],
    "expand": [lambda x, y: x.expand(3, -1, -1)],
    "expand_as": [lambda x, y: x[:, :1].expand_as(y)],
    "flatten": [lambda x, y: x.flatten(1), lambda x, y: x.transpose(1, 2).flatten()],
    "flip": [lambda x, y: x.flip(1, 2)],
    "hstack": [lambda x, y: torch.hstack([x, y])],
    "index_select": [
        lambda x, y: x.index_select(1, places(y[0, :, 0])),
        lambda x, y: x.index_select(2, torch.tensor([5, 0])),
    ],
    "movedim": [lambda x, y: x.movedim(1, 2)],
    "moveaxis": [lambda x, y: torch.moveaxis(x, 1, 0)],
    "narrow": [lambda x, y: x.narrow(1, 1, 2)],
    "numel": [lambda x, y: x * x.numel()],
    "permute": [lambda x, y: x.permute(2, 0, 1)],
    "pixel_shuffle": [lambda x, y: F.pixel_shuffle(x[:, :, None], 2)],
    "repeat": [lambda x, y: x.repeat(2, 1, 2, 3)],
    "repeat_interleave": [lambda x, y: x.repeat_interleave(2, 1)],
    "reshape": [lambda x, y: x.transpose(1, 2).reshape(2, -1)],
    "reshape_as": [lambda x, y: x.transpose(1, 2).reshape_as(y)],
    "roll": [lambda x, y: x.roll(1, 1), lambda x, y: x.roll((2, -1), (1, 2)), lambda x, y: x.roll(3)],
    "select": [lambda x, y: x[:, 2]],
    "slice": [lambda x, y: x[:, 1::2, :-1]],
    "split": [lambda x, y: torch.split(x, 4, 2)],
    "split_with_sizes": [lambda x, y: torch.split(x, [1, 3], 1)],
    "squeeze": [lambda x, y: x[:, :1].squeeze(1)],
    "stack": [lambda x, y: torch.stack([x, y], 1)],
    "swapaxes": [lambda x, y: x.swapaxes(1, 2)],
    "t": [lambda x, y: x[0].t()],
    "tile": [lambda x, y: x.tile(2)],
    "to": [lambda x, y: x.to(torch.int64), lambda x, y: (x * 2).to(torch.bool), lambda x, y: x.to(torch.float64)],
    "_to_copy": [lambda x, y: x.int()],
    "transpose": [lambda x, y: x.transpose(1, 2)],
    "tril": [lambda x, y: x.tril(), lambda x, y: x * torch.ones(6, 6).tril(-1)[:4]],
    "triu": [lambda x, y: x.triu(1), lambda x, y: x + torch.full((4, 6), -math.inf).triu(3)],
    "type_as": [lambda x, y: places(x).type_as(y)],
    "unbind": [lambda x, y: x.unbind(1)],
    "unflatten": [lambda x, y: torch.unflatten(x, 2, (2, 3))],
    "unfold": [lambda x, y: x.unfold(2, 3, 2)],
    "unsqueeze": [lambda x, y: x.unsqueeze(1)],
    "view": [lambda x, y: x.view(1, 2, 12)],
    "view_as": [lambda x, y: x.view_as(y)],
    "vstack": [lambda x, y: torch.vstack([x, y])],
    "select_scatter": [lambda x, y: torch.select_scatter(x, y[:, 0], 1, -1)],
    "slice_scatter": [lambda x, y: torch.slice_scatter(x, y[:, :2], 1, -3, -1)],
    "numpy_T": [lambda x, y: x[0].T],
    "mT": [lambda x, y: x.mT],
    "adjoint": [lambda x, y: x.adjoint()],
    "unsafe_chunk": [lambda x, y: torch.unsafe_chunk(x, 2, 1)],
    "unsafe_split": [lambda x, y: torch.unsafe_split(x, 2, 1)],
    # Indices.
    "gather": [lambda x, y: x.gather(1, places(y[:, :2])), lambda x, y: x.gather(2, places(y, 6))],
    "index": [
        lambda x, y: x[:, torch.tensor([2, 0])],
        lambda x, y: x[:, places(y[0, :, 0])],
        lambda x, y: x[0, places(y[0, :, :3]), places(x[0, :, :3]) - 3],
        lambda x, y: x[torch.zeros(2, dtype=torch.int64), :, places(y[0, :2, 0])],
        lambda x, y: x[:, places(y[0, :2, :1]), torch.arange(3)],
    ],
    "index_add": [
        lambda x, y: x.index_add(1, torch.tensor([2, 2]), y[:, :2]),
        lambda x, y: x.index_add(1, places(y[0, :3, 0]), y[:, :3], alpha=2),
    ],
    "index_copy": [lambda x, y: x.index_copy(1, torch.tensor([2, 0]), y[:, :2])],
    "index_fill": [lambda x, y: x.index_fill(1, torch.tensor([2]), 0.5)],
    "index_put": [
        lambda x, y: x.index_put([torch.tensor([0]), torch.tensor([1])], y[:, 1]),
        lambda x, y: aten.index_put(x, [None, places(y[0, :2, 0]), torch.tensor([1, -1])], y[:, 0, :2]),
        lambda x, y: aten.index_put(x, [None, None, places(y[0, 0])], y, True),
        lambda x, y: aten.index_put(x, [torch.tensor([0])], torch.tensor(0.5)),
        lambda x, y: aten.index_put(x, [is_high(y)], torch.tensor(0.5)),
        lambda x, y: aten.index_put(x, [x > 0.3], torch.tensor(0.5)),
        lambda x, y: aten.index_put(x, [(y > 0.3)[..., 0]], torch.tensor([0.5]), True),
    ],
    "one_hot": [lambda x, y: F.one_hot(places(x), 4)],
    "scatter": [
        lambda x, y: x.scatter(1, places(y[:, :2]), y[:, :2]),
        lambda x, y: x.scatter(2, places(y, 6), 0.5),
        lambda x, y: x.scatter(1, places(y[:, :1], 4), places(y[:, :1], 4).float()),
    ],
    "scatter_add": [lambda x, y: x.scatter_add(1, places(y[:, :3]), y[:, :3])],
    "take_along_dim": [lambda x, y: x.take_along_dim(places(y[:, :2]), 1)],
    "tensor_split": [lambda x, y: x.tensor_split(3, 1), lambda x, y: x.tensor_split([1, 2], 2)],
    # What depends on no value.
    "arange": [lambda x, y: x * torch.arange(6), lambda x, y: x * torch.arange(0.5, 2, 0.25)],
    "eye": [lambda x, y: x[:, :, :4] * torch.eye(4)],
    "full": [lambda x, y: x + torch.full((4, 6), 0.5)],
    "full_like": [lambda x, y: x + torch.full_like(y, 0.5)],
    "linspace": [lambda x, y: x * torch.linspace(0, 1, 6)],
    "new_full": [lambda x, y: x * y.new_full((6,), 2.0)],
    "new_ones": [lambda x, y: torch.cat([x, y.new_ones(1, 4, 1)], 2)],
    "new_zeros": [lambda x, y: torch.cat([x, y.new_zeros(1, 4, 1)], 2)],
    "ones": [lambda x, y: torch.cat([x, torch.ones(1, 4, 1)], 2)],
    "ones_like": [lambda x, y: torch.ones_like(x) + y],
    "scalar_tensor": [lambda x, y: x + torch.scalar_tensor(0.1)],
    "zeros": [lambda x, y: torch.cat([x, torch.zeros(1, 4, 1)], 2)],
    "zeros_like": [lambda x, y: torch.zeros_like(x)],
}  # fmt: skip


def gates(count: int, inputs: int, hidden: int) -> list[Tensor]:
    """Weights and biases of a recurrent cell."""
    shapes = ((count * hidden, inputs), (count * hidden, hidden), (count * hidden,), (count * hidden,))
    return [constant(*shape, seed=seed) - 0.5 for seed, shape in enumerate(shapes)]


def flattened(results: Any) -> Tensor:
    parts = [results] if isinstance(results, Tensor) else list(results)
    parts = [each for part in parts for each in (part if isinstance(part, list | tuple) else [part])]
    return torch.cat([part.reshape(-1).float() for part in parts])


def compare(cases: Mapping[str, Case], given: Sequence[tuple[Tensor, Tensor]], tolerance: float = 2e-5) -> None:
    """Trace a step whose outputs are the results of all cases, and compare each with torch's."""

    def step(tensors: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([flattened(case(x, y)) for case in cases.values()]), y

    traced = trace(step, {}, given[0])
    definition = Definition(traced.form, {name: each.numpy() for name, each in traced.constants.items()})
    for x, y in given:
        with torch.no_grad():
            expected = [flattened(case(x, y)).numpy() for case in cases.values()]
        found, same = definition.step([x.reshape(1, -1).numpy(), y.reshape(1, -1).numpy()])
        ends = np.cumsum([len(each) for each in expected])
        for name, one, other in zip(cases, np.split(found[0], ends[:-1]), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=name)
        np.testing.assert_array_equal(same[0], y.flatten().numpy())


def every_case() -> list[tuple[str, Case]]:
    return [
        *((name, unary(name)) for name in sorted(UNARY)),
        *((name, binary(name)) for name in sorted(BINARY)),
        *((name, of_bools(name)) for name in sorted(OF_BOOLS)),
        *((name, of_places(name)) for name in sorted(OF_INTEGERS)),
        *((name, case) for name, cases in CASES.items() for case in cases),
    ]


TOGETHER: Final = 16
"""Cases in one step, since tracing a step takes longer than what is in it."""


def test_every_operator_is_tried() -> None:
    tried = {*UNARY, *BINARY, *OF_BOOLS, *OF_INTEGERS, *CASES}
    assert tried >= ALLOWED


def frames(low: float, high: float) -> tuple[Tensor, Tensor]:
    """A frame and a leaf [1, 4, 6]."""
    random = np.random.default_rng(1)
    x, y = (torch.from_numpy(random.uniform(low, high, (1, 4, 6)).astype(np.float32)) for _ in range(2))
    return x, y


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("first", range(0, len(every_case()), TOGETHER))
def test_it_gives_what_torch_gives(first: int) -> None:
    some = every_case()[first : first + TOGETHER]
    compare({f"{name}-{at}": case for at, (name, case) in enumerate(some)}, [frames(0.1, 0.9), frames(-3, 3)])


EXTREME: Final = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, 88.0, 1e30, -1e30, math.inf, -math.inf, math.nan)
NOT_OF_EXTREMES: Final = frozenset(["cos", "sin", "sinc", "tan", "gelu", "glu"])
"""Sine and cosine end at 2^46; gelu is NaN for infinity in torch only, and glu takes even sizes."""


def test_extreme_numbers_are_treated_as_torch_does() -> None:
    values = torch.tensor(EXTREME)
    x, y = values.repeat_interleave(len(values)).reshape(1, 15, 15), values.repeat(15).reshape(1, 15, 15)
    names = sorted((UNARY | BINARY) - NOT_OF_EXTREMES)
    compare({name: unary(name) if name in UNARY else binary(name) for name in names}, [(x, y)], 3e-5)


def test_powers_of_extreme_numbers_are_those_of_torch() -> None:
    def power_of(power: float) -> Case:
        return lambda x, y: x**power

    values = torch.tensor(EXTREME).reshape(1, -1)
    powers = (0, 1, 2, 3, -1, -9, 0.5, -0.5, 1.3, 12)
    compare({str(power): power_of(power) for power in powers}, [(values, values)], 3e-5)
