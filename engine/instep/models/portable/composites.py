"""Definitions of torch operators that consist of several primitives. They are part of `portable-1`.

Each sum and each product of matrices is one chain in the order of its elements; `torch.addcmul` stands for one fused
multiply-add, and `torch.addmm` continues a chain. Operators that are not defined here come from torch's decompositions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

aten: Final = torch.ops.aten
Sizes: TypeAlias = Sequence[int]

# Linear maps, and layers that normalize.


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _chain(bias, x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _chain(start: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())


def _added_vector(start: Tensor, a: Tensor, b: Tensor, **factors: float) -> Tensor:
    return torch.addmm(start.unsqueeze(-1), a, b.unsqueeze(1), **factors).squeeze(1)  # type: ignore[call-overload, no-any-return]


def _mean(x: Tensor, dims: Sizes | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = dims or range(x.dim())
    x = x if dtype is None else x.to(dtype)
    return x.sum(list(dims), keepdim) / math.prod(x.shape[dim] for dim in dims)


def _deviation(x: Tensor, dims: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the differences from it, and the sum of their squares."""
    mean = _mean(x, dims, True)
    away = x - mean
    return mean, away, (away * away).sum(list(dims), True)


def _normalized(x: Tensor, dims: Sizes, eps: float) -> Tensor:
    _, away, squares = _deviation(x, dims)
    return away * _rsqrt(squares / math.prod(x.shape[dim] for dim in dims) + eps)


def _rsqrt(x: Tensor) -> Tensor:
    return torch.reciprocal(torch.sqrt(x))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1, *[1] * (x.dim() - 2))


def _layer_norm(
    x: Tensor, shape: Sizes, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _scaled(_normalized(x, range(-len(shape), 0), eps), weight, bias)


def _rms_norm(x: Tensor, shape: Sizes, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    squares = _mean(x * x, range(-len(shape), 0), True)
    return _scaled(x * _rsqrt(squares + (torch.finfo(x.dtype).eps if eps is None else eps)), weight, None)


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    y = _normalized(x.reshape(x.shape[0], groups, -1), [-1], eps).reshape(x.shape)
    return _scaled(y, _by_channel(x, weight), _by_channel(x, bias))


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, _train: bool, _by: float, eps: float, *_: Any
) -> Tensor:
    mean, scale = (each.reshape(-1, *[1] * (x.dim() - 2)) for each in (mean, _rsqrt(var + eps)))
    return _scaled((x - mean) * scale, _by_channel(x, weight), _by_channel(x, bias))


def _evaluated_batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, by: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, weight, bias, mean, var, False, by, eps), mean, var


def _batch_norm_of_itself(
    x: Tensor, weight: Any, bias: Any, _train: bool, _by: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = _scaled(_normalized(x, [0, *range(2, x.dim())], eps), _by_channel(x, weight), _by_channel(x, bias))
    return y, x.new_zeros(0), x.new_zeros(0)


def _instance_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, from_input: bool, by: float, eps: float, *_: Any
) -> Tensor:
    if not from_input:
        return _batch_norm(x, weight, bias, mean, var, False, by, eps)
    return _scaled(_normalized(x, range(2, x.dim()), eps), _by_channel(x, weight), _by_channel(x, bias))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    _dropout: float = 0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    most = scores.amax(-1, True)
    e = torch.exp(scores - torch.where(most == -math.inf, 0, most))
    total = e.sum(-1, True)
    return torch.where(total == 0, 0, e / total) @ v  # where everything is masked


# Recurrent cells, and layers of them over the timesteps of one frame.


def _gates(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """One chain that adds both biases, the inputs, and then the states."""
    start = None if b_ih is None or b_hh is None else b_ih + b_hh
    return torch.addmm(_chain(start, x, w_ih), h, w_hh.t())


def _gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """A GRU cell. The two parts of the new gate are separate chains, because the reset gate scales only one of them."""
    gates, new = ([None if w is None else w[part] for w in (w_ih, w_hh, b_ih, b_hh)] for part in _parts(2 * h.shape[1]))
    r, z = torch.sigmoid(_gates(x, h, *gates)).chunk(2, 1)  # type: ignore[arg-type]
    n = torch.tanh(torch.addcmul(_chain(new[2], x, new[0]), r, _chain(new[3], h, new[1])))  # type: ignore[arg-type]
    return torch.addcmul(n, z, h - n)


def _parts(place: int) -> tuple[slice, slice]:
    return slice(place), slice(place, None)


def _lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    i, f, g, o = _gates(x, state[0], *weights, *[None] * (4 - len(weights))).chunk(4, 1)
    c = torch.addcmul(torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), state[1])
    return torch.sigmoid(o) * torch.tanh(c), c


def _rnn_cell(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, h, *weights: function(_gates(x, h, *weights, *[None] * (4 - len(weights))))


def _layers(cell: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:

    def run(
        x: Tensor, state: Any, params: Sequence[Tensor], _biases: bool, layers: int, _dropout: float, _train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x = x.transpose(0, 1) if batch_first else x
        leaves = [state] if isinstance(state, Tensor) else list(state)
        directions = 2 if bidirectional else 1
        count = len(params) // (layers * directions)
        after: list[list[Tensor]] = [[] for _ in leaves]
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                weights = list(params[place * count : (place + 1) * count])
                projection = weights.pop() if count in (3, 5) else None
                now, answers = [leaf[place] for leaf in leaves], []
                for frame in x.unbind(0)[:: -1 if direction else 1]:
                    found = cell(frame, now if len(now) > 1 else now[0], *weights)
                    now = [found] if isinstance(found, Tensor) else list(found)
                    if projection is not None:
                        now[0] = _chain(None, now[0], projection)
                    answers.append(now[0])
                outputs.append(torch.stack(answers[:: -1 if direction else 1]))
                for leaf, each in zip(after, now, strict=True):
                    leaf.append(each)
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1) if batch_first else x, *map(torch.stack, after)

    return run


# Reductions and scans.


def _var(
    x: Tensor, dims: Sizes | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(dims or range(x.dim()))
    mean, _, squares = _deviation(x, dims)
    count = math.prod(x.shape[dim] for dim in dims) - (1 if correction is None else correction)
    found = squares / max(count, 0), mean
    return found if keepdim else (found[0].squeeze(dims), found[1].squeeze(dims))


def _minimum_of(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim), _argmin(x, dim, keepdim)


def _argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return torch.argmax(-x if x.is_floating_point() else ~x, dim, keepdim)  # -x of the least integer is itself


# Functions of elements.


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    apart = torch.where(a == b, 0, torch.abs(a - b))  # also where both are infinite
    return torch.maximum(a, b) + torch.log1p(torch.exp(-apart))


def _power_of(x: Any, power: Any) -> Tensor:
    """exp(power * log|x|), with the sign and the special cases of IEEE's pow."""
    x = torch.as_tensor(x)
    far = torch.abs(x)
    size = torch.exp(power * torch.log(far))
    power = torch.as_tensor(power, dtype=size.dtype)
    size = torch.where((power == 0) | (far == 1), 1, size)
    is_whole, is_odd = torch.floor(power) == power, torch.abs(torch.fmod(power, 2)) == 1
    signed = torch.where(is_odd, -size, torch.where(is_whole | (far == 0) | (far == math.inf), size, math.nan))
    return torch.where(torch.copysign(torch.ones(()), x) < 0, signed, size)


def _pow(x: Tensor, power: float) -> Tensor:
    if abs(power) == 0.5:
        return torch.sqrt(x) if power > 0 else _rsqrt(x)
    if not float(power).is_integer() or abs(power) > 8:
        return _power_of(x, power)
    if power == 0:
        return torch.ones_like(x)
    product = functools.reduce(torch.mul, [x] * int(abs(power)))
    return product if power > 0 else torch.reciprocal(product)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    across, along = torch.abs(y), torch.abs(x)
    most = torch.maximum(across, along)
    ratio = torch.where(across == along, 1.0, torch.minimum(across, along) / most)
    angle = torch.atan(torch.where(most == 0, 0.0, ratio))
    angle = torch.where(across > along, math.pi / 2 - angle, angle)
    angle = torch.where(torch.copysign(torch.ones(()), x) < 0, math.pi - angle, angle)
    return torch.copysign(angle, y)


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    a, b = torch.abs(a), torch.abs(b)
    most = torch.maximum(a, b)
    ratio = torch.where(most == 0, 0, torch.minimum(a, b) / most)
    return torch.where((a == math.inf) | (b == math.inf), math.inf, most * torch.sqrt(ratio * ratio + 1))


def _sign(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype) if x.dtype != torch.bool else x.clone()


# Windows over the last dimensions.


def _windows(
    x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil: bool, around: float, beyond: float
) -> Tensor:
    """Windows over the last dimensions, one for each entry of `kernel`.

    `around` fills the padding, and `beyond` the elements that a last window covers when sizes are rounded up.
    """
    rank = len(kernel)
    dims = range(x.dim() - rank, x.dim())
    kernel, padding, dilation = (list(each) * (rank // len(each)) for each in (kernel, padding, dilation))
    stride = list(stride) * (rank // len(stride)) if stride else kernel
    more = []
    for size, k, s, p, d in zip(x.shape[-rank:], kernel, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        count = (size + 2 * p - reach + (s - 1 if ceil else 0)) // s + 1
        count -= (count - 1) * s >= size + p  # a window must begin within the elements or the padding before them
        more.append(max((count - 1) * s + reach - size - 2 * p, 0))
    x = F.pad(x, [p for each in reversed(padding) for p in (each, each)], value=around)
    x = F.pad(x, [p for each in reversed(more) for p in (0, each)], value=beyond)
    for dim, k, s, d in zip(dims, kernel, stride, dilation, strict=True):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x


def _max_pool(rank: int) -> Callable[..., Tensor]:
    def run(
        x: Tensor, kernel: Sizes, stride: Sizes = (), padding: Sizes = (0,), dilation: Sizes = (1,), ceil: bool = False
    ) -> Tensor:
        least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        windows = _windows(x, list(kernel) * (rank // len(kernel)), stride, padding, dilation, ceil, least, least)
        return windows.amax(list(range(-rank, 0)))

    return run


def _avg_pool(rank: int) -> Callable[..., Tensor]:
    def run(
        x: Tensor, kernel: Sizes, stride: Sizes = (), padding: Sizes = (0,), ceil: bool = False,
        count_include_pad: bool = True, divisor: int | None = None,
    ) -> Tensor:  # fmt: skip
        kernel, dims = list(kernel) * (rank // len(kernel)), list(range(-rank, 0))
        ones = torch.ones(x.shape[-rank:], dtype=x.dtype)
        counted = _windows(ones, kernel, stride, padding, [1], ceil, float(count_include_pad), 0.0).sum(dims)
        total = _windows(x, kernel, stride, padding, [1], ceil, 0.0, 0.0).sum(dims)
        return total / (counted if divisor is None else divisor)

    return run


# Elements that are picked by indices.


def _flat_index(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor, list[int], list[int], Tensor]:
    """Move the indexed dimensions to the front, merge them into one, and index that.

    Returns:
        That tensor [places, others], the order of dimensions that makes it, the sizes of the others, and the places.
    """
    if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices):
        raise ValueError("a mask as an index: use torch.where")
    dims = [dim for dim, each in enumerate(indices) if each is not None]
    others = [dim for dim in range(x.dim()) if dim not in dims]
    given = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
        *(each.to(torch.int64) for each in indices if each is not None)
    )
    places = given[0]
    if len(dims) > 1:
        places = torch.zeros_like(given[0])
        for dim, each in zip(dims, given, strict=True):
            size = x.shape[dim]
            places = places * size + torch.where(each < 0, each + size, each).clamp(0, size - 1)
    sizes = [x.shape[dim] for dim in others]
    return x.permute(*dims, *others).reshape(-1, math.prod(sizes)), [*dims, *others], sizes, places


def _arrangement(indices: Sequence[Tensor | None], places: Tensor, others: int) -> list[int]:
    """The order of the dimensions [places, others] in an indexed result: as the indices were, if these are adjacent."""
    dims = [dim for dim, each in enumerate(indices) if each is not None]
    before = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    rank = places.dim()
    return [*range(rank, rank + before), *range(rank), *range(rank + before, rank + others)]


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    flat, _, sizes, places = _flat_index(x, indices)
    found = flat.index_select(0, places.reshape(-1)).reshape(*places.shape, *sizes)
    return found.permute(_arrangement(indices, places, len(sizes)))


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, *_: Any
) -> Tensor:
    if len(indices) == values.numel() == 1 and (mask := indices[0]) is not None and mask.dtype == torch.bool:
        chosen = x + values if accumulate else values.reshape(()).to(x.dtype)
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), chosen, x)
    flat, order, sizes, places = _flat_index(x, indices)
    arrangement = _arrangement(indices, places, len(sizes))
    shape = [[*places.shape, *sizes][dim] for dim in arrangement]
    back = [arrangement.index(dim) for dim in range(len(arrangement))]
    rows = values.expand(shape).permute(back).reshape(-1, flat.shape[1])
    at = places.reshape(-1, 1).expand(rows.shape)
    flat = flat.scatter_add(0, at, rows) if accumulate else flat.scatter(0, at, rows)
    return (
        flat.reshape([x.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(x.dim())]).contiguous()
    )


def _one_hot(index: Tensor, classes: int = -1) -> Tensor:
    return (index.unsqueeze(-1) == torch.arange(classes)).to(torch.int64)


def _repeat(x: Tensor, times: Sizes) -> Tensor:
    sizes = [1] * (len(times) - x.dim()) + list(x.shape)
    apart = x.reshape([each for size in sizes for each in (1, size)])
    repeated = apart.expand([each for pair in zip(times, sizes, strict=True) for each in pair])
    return repeated.reshape([count * size for count, size in zip(times, sizes, strict=True)])


# Spectra. Complex numbers exist while the graph is read, and only as two tensors.


@dataclass(frozen=True)
class Complex:
    """Complex numbers as a real and an imaginary part."""

    real: Tensor
    imag: Tensor


def _times(a: Any, b: Any) -> Complex:
    a, b = (each if isinstance(each, Complex) else Complex(each, torch.zeros(())) for each in (a, b))
    return Complex(torch.addcmul(-(a.imag * b.imag), a.real, b.real), torch.addcmul(a.imag * b.real, a.real, b.imag))


def _turns(count: Tensor, size: int, sign: int, dtype: torch.dtype) -> Complex:
    angles = count.double() * (2 * math.pi / size)
    return Complex(torch.cos(angles).to(dtype), torch.sin(angles).to(dtype) * sign)


def _transform(x: Complex, is_inverse: bool, frequencies: int) -> Complex:
    """The first frequencies of the last dimension: by Stockham's algorithm for a power of two, else by chains."""
    size, sign, dtype = x.real.shape[-1], 1 if is_inverse else -1, x.real.dtype
    if size & (size - 1):
        turn = _turns(torch.outer(torch.arange(size), torch.arange(frequencies)) % size, size, sign, dtype)
        real, imag = (each.reshape(-1, size) for each in (x.real, x.imag))
        y = torch.addmm(-(imag @ turn.imag), real, turn.real), torch.addmm(imag @ turn.real, real, turn.imag)
        return Complex(*(each.reshape(*x.real.shape[:-1], frequencies) for each in y))
    real, imag = x.real.unsqueeze(-2), x.imag.unsqueeze(-2)
    while (done := real.shape[-2]) < size:
        (even, odd), (even_imag, odd_imag) = real.chunk(2, -1), imag.chunk(2, -1)
        turned = _times(Complex(odd, odd_imag), _turns(torch.arange(done).unsqueeze(-1), 2 * done, sign, dtype))
        real = torch.cat([even + turned.real, even - turned.real], -2)
        imag = torch.cat([even_imag + turned.imag, even_imag - turned.imag], -2)
    return Complex(*(each.squeeze(-1)[..., :frequencies] for each in (real, imag)))


def _mirrored(x: Complex, size: int) -> Complex:
    """All frequencies of a real signal from the first half; the second half is its conjugate in reverse order."""
    half = x.real.shape[-1]
    is_own_mirror = torch.arange(half) % (size / 2) == 0
    imag = torch.where(is_own_mirror, 0, x.imag)
    rest = [each[..., 1 : size - half + 1].flip(-1) for each in (x.real, imag)]
    return Complex(torch.cat([x.real, rest[0]], -1), torch.cat([imag, -rest[1]], -1))


def _spectrum(kind: str) -> Callable[..., Any]:
    is_inverse = kind in ("ifft", "irfft")

    def run(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
        if not isinstance(x, Complex):
            x = x if x.is_floating_point() else x.float()
            x = Complex(x, torch.zeros(x.shape, dtype=x.dtype))
        x = Complex(*(each.movedim(dim, -1) for each in (x.real, x.imag)))
        count = x.real.shape[-1]
        size = n or (2 * (count - 1) if kind == "irfft" else count)
        half = size // 2 + 1
        x = Complex(*(F.pad(each, [0, (half if kind == "irfft" else size) - count]) for each in (x.real, x.imag)))
        x = _mirrored(x, size) if kind == "irfft" else x
        y = _transform(x, is_inverse, half if kind == "rfft" else size)
        scale = size**-0.5 if norm == "ortho" else 1 / size if is_inverse == (norm != "forward") else 1
        parts = ((each if scale == 1 else each * scale).movedim(-1, dim) for each in (y.real, y.imag))
        return next(parts) if kind == "irfft" else Complex(*parts)

    return run


SPECTRA: Final[dict[str, Callable[..., Any]]] = {
    **{f"fft_{kind}": _spectrum(kind) for kind in ("fft", "ifft", "rfft", "irfft")},
    "complex": Complex,
    "polar": lambda size, angle: Complex(size * torch.cos(angle), size * torch.sin(angle)),
    "view_as_complex": lambda x: Complex(*x.unbind(-1)),
}
OF_COMPLEX: Final[dict[str, Callable[..., Any]]] = {
    **{name: function for name, function in SPECTRA.items() if name.startswith("fft")},
    "real": lambda x: x.real,
    "imag": lambda x: x.imag,
    "view_as_real": lambda x: torch.stack([x.real, x.imag], -1),
    "abs": lambda x: _hypot(x.real, x.imag),
    "angle": lambda x: _atan2(x.imag, x.real),
    "add": lambda a, b: Complex(a.real + b.real, a.imag + b.imag),
    "sub": lambda a, b: Complex(a.real - b.real, a.imag - b.imag),
    "mul": _times,
}

OWN: Final[dict[Any, Callable[..., Any]]] = {
    aten.lerp.Tensor: lambda a, b, w: torch.addcmul(a, w, b - a),
    aten.lerp.Scalar: lambda a, b, w: torch.addcmul(a, torch.full((), w), b - a),
    aten.linear.default: _linear,
    aten.dot.default: lambda a, b: (a.unsqueeze(0) @ b.unsqueeze(1)).reshape(()),
    aten.mv.default: lambda a, b: torch.mm(a, b.unsqueeze(1)).squeeze(1),
    aten.addmv.default: _added_vector,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten._native_batch_norm_legit_no_training.default: _evaluated_batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_of_itself,
    aten.scaled_dot_product_attention.default: _attention,
    aten.gru_cell.default: _gru_cell,
    aten.lstm_cell.default: _lstm_cell,
    aten.rnn_tanh_cell.default: _rnn_cell(torch.tanh),
    aten.rnn_relu_cell.default: _rnn_cell(torch.relu),
    aten.gru.input: _layers(_gru_cell),
    aten.lstm.input: _layers(_lstm_cell),
    aten.rnn_tanh.input: _layers(_rnn_cell(torch.tanh)),
    aten.rnn_relu.input: _layers(_rnn_cell(torch.relu)),
    aten.mean.default: lambda x, dtype=None: _mean(x, dtype=dtype),
    aten.mean.dim: _mean,
    aten.var.correction: lambda x, dims=None, **more: _var(x, dims, **more)[0],
    aten.var_mean.correction: _var,
    aten.std_mean.correction: lambda x, dims=None, **more: (torch.sqrt((found := _var(x, dims, **more))[0]), found[1]),
    aten.max.dim: lambda x, dim, keepdim=False: (x.amax(dim, keepdim), torch.argmax(x, dim, keepdim)),
    aten.min.dim: _minimum_of,
    aten.argmin.default: _argmin,
    aten.rsqrt.default: _rsqrt,
    aten.pow.Tensor_Scalar: _pow,
    aten.pow.Tensor_Tensor: _power_of,
    aten.pow.Scalar: _power_of,
    aten.logaddexp.default: _logaddexp,
    aten.exp2.default: lambda x: torch.exp(x * math.log(2)),
    aten.log2.default: lambda x: torch.log(x) * (1 / math.log(2)),
    aten.log10.default: lambda x: torch.log(x) * (1 / math.log(10)),
    aten.erfc.default: lambda x: 1 - torch.erf(x),
    aten.tan.default: lambda x: torch.sin(x) / torch.cos(x),
    aten.asin.default: lambda x: torch.atan(x / torch.sqrt((1 - x) * (1 + x))),
    aten.acos.default: lambda x: 2 * torch.atan(torch.sqrt((1 - x) / (1 + x))),
    aten.atan2.default: _atan2,
    aten.cosh.default: lambda x: (torch.exp(x) + torch.exp(-x)) / 2,
    aten.hypot.default: _hypot,
    aten.sign.default: _sign,
    aten.sgn.default: _sign,
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.avg_pool1d.default: _avg_pool(1),
    aten.avg_pool2d.default: _avg_pool(2),
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.one_hot.default: _one_hot,
    aten.repeat.default: _repeat,
}
"""Definitions by operator. Composite operators are replaced in the step's own graph, others also inside decompositions.
"""
