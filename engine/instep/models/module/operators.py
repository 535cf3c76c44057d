"""The operators that a graph may call: the ones of torch's `aten` that are listed here.

Called as listed, each treats rows independently, changes nothing in place, and computes no size from values. `export`
refuses a step that calls any other operator, and `program` refuses such a folder.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch

from instep.models.errors import ModelError

Operator: TypeAlias = torch._ops.OpOverload

_ELEMENTWISE: Final = """
    __and__ __or__ __xor__ abs acos add addcdiv addcmul asin atan atan2 bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil clamp clamp_max clamp_min copy copysign cos cosh deg2rad div divide eq erf erfc exp exp2 expm1 fill
    fix floor floor_divide fmod frac ge greater gt heaviside hypot isclose isfinite isinf isnan le lerp less log
    log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum
    minimum mul multiply nan_to_num ne neg negative pow rad2deg reciprocal remainder round rsqrt rsub sgn sigmoid
    sign sin sinc special_expit special_xlog1py sqrt square sub subtract tan tanh true_divide trunc where xlogy
"""
_ACTIVATIONS: Final = """
    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu relu
    relu6 selu silu softmax softplus softshrink threshold
"""
_LAYERS: Final = """
    addmm addmv baddbmm bmm conv1d conv2d conv3d conv_transpose1d convolution dot einsum embedding group_norm gru
    gru_cell batch_norm instance_norm inner layer_norm linear linalg_norm linalg_vecdot linalg_vector_norm lstm
    lstm_cell matmul mm mv outer rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_dot_product_attention
    cosine_similarity norm upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d _weight_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training
"""
_SPECTRA: Final = "angle complex fft_fft fft_ifft fft_irfft fft_rfft imag polar real view_as_complex view_as_real"
_REDUCTIONS: Final = """
    all amax amin any argmax argmin count_nonzero cumprod cumsum diff logsumexp max mean min nansum prod std
    std_mean sum var var_mean avg_pool1d avg_pool2d adaptive_avg_pool1d max_pool1d max_pool2d
"""
_SHAPES: Final = """
    broadcast_to cat chunk clone concat constant_pad_nd contiguous diagonal expand expand_as flatten flip hstack
    index_select movedim moveaxis narrow numel pad permute pixel_shuffle repeat repeat_interleave reshape reshape_as
    roll select slice split split_with_sizes squeeze stack swapaxes t tile to transpose tril triu type_as unbind
    unflatten unfold unsqueeze view view_as vstack select_scatter slice_scatter numpy_T mT adjoint unsafe_chunk
    unsafe_split _to_copy _unsafe_view
"""
_INDEXING: Final = """
    gather index index_add index_copy index_fill index_put one_hot scatter scatter_add take_along_dim tensor_split
"""
_CREATION: Final = """
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
"""
ALLOWED: Final = frozenset(
    " ".join((_ELEMENTWISE, _ACTIVATIONS, _LAYERS, _SPECTRA, _REDUCTIONS, _SHAPES, _INDEXING, _CREATION)).split()
)
SHAPES: Final = frozenset(_SHAPES.split())
CREATION: Final = frozenset(_CREATION.split())
"""Operators whose results do not depend on the values of their arguments."""
NUMBERS: Final[dict[str, Callable[..., Any]]] = {
    "getitem": operator.getitem,
    "int.add": operator.add,
    "int.sub": operator.sub,
    "int.mul": operator.mul,
    "int.floordiv": operator.floordiv,
    "int.mod": operator.mod,
    "int.neg": operator.neg,
}
"""Operators that pick one of several results, and arithmetic on sizes."""
_HINTS: Final = {
    **dict.fromkeys(("cond", "while_loop"), "use torch.where, or a fixed number of rounds"),
    **dict.fromkeys(
        ("item", "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2"),
        "rows of other streams would decide along: use torch.where over all elements",
    ),
    **dict.fromkeys(
        ("rand", "randn", "rand_like", "randn_like", "bernoulli", "native_dropout"),
        "a frame could never be computed again: leave noise out, or take it from the frame",
    ),
}
_MOST: Final = 2**40
_SIZES: Final = (int, torch.SymInt)
"""The arithmetic on sizes as it appears while a step is traced."""


def resolve(op: str) -> Callable[..., Any]:
    """The function of a node.

    Raises:
        ModelError: when it is not one that a graph may call.
    """
    if op in NUMBERS:
        return NUMBERS[op] if op == "getitem" else _of_sizes(NUMBERS[op])
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if namespace == "aten" and name in ALLOWED:
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            raise ModelError(f"the graph calls {op:.120}, which torch {torch.__version__} lacks; install a newer torch")
        if overload in packet.overloads() and is_allowed(found := getattr(packet, overload)):
            return found  # type: ignore[no-any-return]
    raise ModelError(
        f"the graph calls {op!r:.120}, which no step may; export the module with instep.models.export_step"
    )


def _of_sizes(function: Callable[..., int]) -> Callable[..., int]:
    """Arithmetic that accepts and returns only sizes, so a graph cannot make huge values with it."""

    def calculate(*sizes: int) -> int:
        if not all(isinstance(size, _SIZES) and -_MOST < size < _MOST for size in sizes):
            raise ValueError("arithmetic is for sizes only")
        return function(*sizes)

    return calculate


def is_allowed(op: Operator) -> bool:
    """Whether a graph may call an operator."""
    return op.namespace == "aten" and name_of(op) in ALLOWED and not written(op)


def name_of(op: Operator) -> str:
    """The name of an operator without its namespace and overload."""
    return op._schema.name.partition("::")[2]


def written(op: Operator) -> list[int]:
    """The positions of the arguments that the operator changes in place."""
    return [
        at
        for at, declared in enumerate(op._schema.arguments)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]


def unknown(where: str, name: str) -> str:
    """The reason that a call cannot be served."""
    return f"{where} calls {name}, which cannot be served; {_HINTS.get(name, 'write it with other functions of torch')}"
