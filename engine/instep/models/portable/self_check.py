"""Checks that this machine computes `portable-1`, by comparing digests of results with stored ones.

The sample form contains every primitive, and the inputs have all magnitudes. Their values are made from integers, so
they are the same on every machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.models.errors import ModelError
from instep.models.portable.compiler import CompiledStep
from instep.models.portable.form import (
    ARITHMETIC,
    COMPARISONS,
    MAPS,
    Builder,
    Form,
    View,
    broadcast,
    contiguous,
    narrow,
    permute,
    reshape,
)
from instep.models.recurrent import normal
from instep_client.protocol.state_spec import DTYPES, Leaf, StateSpec

ROWS: Final = 27
"""The number of rows, which uses both the code for many rows and the code for a few."""
DIGEST: Final = "23be88ba53a734e6622ad644172056967364af800c643b174ee5045b565548af"
"""The digest for `ROWS` rows of the samples."""
FEATURES: Final = 40
_UNITS: Final = 24
_WHOLE_LEAF: Final = 8
STATE: Final = StateSpec((Leaf("h", (_UNITS,), DTYPES["float32"]), Leaf("counts", (_WHOLE_LEAF,), DTYPES["int64"])))
_FUNCTIONS: Final = [op for op, (count, dtypes) in MAPS.items() if "float32" in dtypes and count == 1]
_PAIRS: Final = [op for op, (count, dtypes) in MAPS.items() if "float32" in dtypes and count == 2]
_OF_WHOLE: Final = [op for op, (count, dtypes) in MAPS.items() if "int64" in dtypes and count == 2]


def sample_form() -> tuple[Form, dict[str, npt.NDArray[Any]]]:
    """The form, over frames of `FEATURES` values and a float32 and an int64 leaf, and its tensors."""
    b = Builder()
    x = b.input("float32", (FEATURES,))
    h = b.input("float32", (_UNITS,))
    counts = b.input("int64", (_WHOLE_LEAF,))
    tensors: dict[str, npt.NDArray[Any]] = {}

    def weight(name: str, *shape: int) -> View:
        values = _uniform(np.prod(shape, dtype=int), 17 + len(tensors)) * np.float32(0.3)
        tensors[name] = values.reshape(shape)
        return b.tensor(name, "float32", shape)

    def cell(name: str, gates: int) -> normal.Weights:
        rows = gates * _UNITS
        return (
            weight(f"{name}.ih", rows, FEATURES),
            weight(f"{name}.hh", rows, _UNITS),
            weight(f"{name}.bih", rows),
            weight(f"{name}.bhh", rows),
        )

    parts = [b.map(op, x) for op in _FUNCTIONS]
    turned = permute(reshape(x, (8, FEATURES // 8)), (1, 0))
    other = b.map("copy", turned)
    parts += [reshape(b.map(op, turned, b.map("mul", other, 0.37)), (FEATURES,)) for op in _PAIRS]
    parts += [b.cast(b.map(op, x, 0.5), "float32") for op in sorted(COMPARISONS)]
    parts.append(b.map("where", b.map("gt", x, 0.0), x, b.cast(b.cast(x, "float64"), "float32")))
    grid = reshape(x, (5, 8))
    parts += [b.reduce(op, grid, [1]) for op in ("sum", "prod", "amax", "amin")]
    parts.append(b.cast(b.reduce("argmax", grid, [0]), "float32"))
    parts.append(b.cast(b.reduce("any", b.map("gt", grid, 1.0), [1]), "float32"))
    parts += [b.emit(op, b.fresh("float32", (5, 8)), grid) for op in ("cumsum", "cumprod")]
    parts.append(b.emit("fma_chain", b.fresh("float32", (5, 5)), 0.5, *_outer(grid)))
    index = b.cast(narrow(x, 0, 0, 6), "int64")
    parts.append(b.emit("take", b.fresh("float32", (6,)), broadcast(h, (6, _UNITS)), index))
    spread = b.map("copy", h)
    parts.append(b.emit("put_add", reshape(spread, (1, _UNITS)), narrow(index, 0, 0, 1), narrow(x, 0, 3, 1)))
    filtered = _filtered(b, x, weight("filter", 6, 3))
    gru = normal.gru_cell(b, x, h, cell("gru", 3))
    hidden, memory = normal.lstm_cell(b, x, gru, h, cell("lstm", 4))
    rnn = normal.rnn_cell(b, x, memory, cell("rnn", 1), "relu")
    normed = normal.layer_norm(b, hidden, weight("norm.w", _UNITS), weight("norm.b", _UNITS), 1e-5)
    parts += [filtered, normal.softmax(b, rnn), normed]
    wide = b.cast(x, "float64")
    parts.append(b.cast(b.map("sqrt", b.map("fma", wide, wide, 1.5)), "float32"))
    y = b.fresh("float32", (sum(part.elements for part in parts),))
    at = 0
    for part in parts:
        b.map("copy", part, out=View(y.buffer, at, part.shape, contiguous(part.shape)))
        at += part.elements
    after = counts
    for op in _OF_WHOLE:
        after = b.map(op, b.map("add", after, 12345), b.cast(narrow(x, 0, 8, _WHOLE_LEAF), "int64"))
    return b.form([y, b.map("add", normed, gru), after]), tensors


def _outer(grid: View) -> tuple[View, View]:
    """Factors [i, j, k] of the products of all pairs of a grid's rows i and j."""
    rows, columns = grid.strides
    count, inner = grid.shape
    return (
        View(grid.buffer, grid.offset, (count, count, inner), (rows, 0, columns)),
        View(grid.buffer, grid.offset, (count, count, inner), (0, rows, columns)),
    )


def _filtered(b: Builder, x: View, taps: View) -> View:
    channels, width = taps.shape
    steps = x.shape[0] - width + 1
    out = b.fresh("float32", (channels, steps))
    shape = (channels, steps, width)
    signal = View(x.buffer, x.offset, shape, (0, 1, 1))
    weights = View(taps.buffer, taps.offset, shape, (width, 0, 1))
    start = View(x.buffer, x.offset, (channels, steps), (0, 1))
    return b.emit("fma_chain", out, start, signal, weights)


def sample_inputs(rows: int) -> list[npt.NDArray[Any]]:
    """A frame and both leaves for each row, of all magnitudes, with some infinities, NaN and denormals."""
    bits = _random_bits(rows * FEATURES, 1).reshape(rows, FEATURES)
    x = _uniform(rows * FEATURES, 2).reshape(rows, FEATURES) * np.float32(8)
    wild = (bits >> 8) % 11 == 0
    x[wild] = bits.astype(np.uint32).view(np.float32)[wild]
    h = _uniform(rows * _UNITS, 3).reshape(rows, _UNITS)
    counts = _random_bits(rows * _WHOLE_LEAF, 4).reshape(rows, _WHOLE_LEAF).view(np.int64)
    return [x, h, counts]


def _random_bits(count: int, seed: int) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, applied to a counter."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _uniform(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Values in [-1, 1) that are exact multiples of 2^-23."""
    whole = (_random_bits(count, seed) >> np.uint64(40)).astype(np.int64) - 2**23
    return (whole.astype(np.float32) * np.float32(2.0**-23)).astype(np.float32)


def digest_of(arrays: Sequence[npt.NDArray[Any]]) -> str:
    """The sha256 in hex of the bytes of arrays, in order."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()


@cache
def check_arithmetic() -> None:
    """Compute the samples and compare their digest. This takes milliseconds once the code is cached.

    Raises:
        ModelError: when any bit differs from the definition.
    """
    form, tensors = sample_form()
    x, h, counts = sample_inputs(ROWS)
    y, after = CompiledStep(form, tensors, STATE, "the samples").run(x, STATE.pack({"h": h, "counts": counts}))
    if (found := digest_of([y, after])) != DIGEST:
        raise ModelError(
            f"this machine does not compute {ARITHMETIC} as it is defined (digest {found[:12]}… instead of "
            f"{DIGEST[:12]}…), so its answers could not be verified elsewhere: update llvmlite, and report the "
            "processor and the version of llvmlite"
        )
