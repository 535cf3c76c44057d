"""The specification of a stream's state: named arrays ("leaves"), kept as one row of bytes per stream.

The row is the unit in which a state is stored, snapshotted, recorded and sent. Its layout is that of a C struct without
bit fields: leaves in the order of the specification, little-endian, each at the next multiple of its item size; the row
ends at a multiple of the largest item size. Padding bytes are zero. A state of one float32 leaf is therefore the bytes
of that array and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
LeafArrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""By name, arrays [N, *shape] of N streams."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "int64", "bool")
}
MAX_LEAVES: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_ROW_BYTES: Final = 64 * 1024 * 1024
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,31}")


class InvalidStateSpec(ValueError):
    """An invalid specification; the message names the leaf and the rule."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a stream's state.

    Raises:
        InvalidStateSpec: for a name, shape, dtype or initial value that is not allowed.
    """

    name: str
    """1 to 32 letters, digits, dots and underscores; it does not begin with a digit or a dot."""
    shape: tuple[int, ...]
    """Up to 4 extents of at least 1; `()` for a single value."""
    dtype: np.dtype[Any]
    """float32, float64, int64 or bool, little-endian."""
    initial: float | None = 0.0
    """The value of every element before the first frame: finite, an integer for int64, 0 or 1 for bool. None where the
    model has learned an array of its own."""
    learned: bytes = field(default=b"", compare=False, repr=False)
    """The learned array as bytes of a row; empty where it is unknown, as in clients. It is not compared, because states
    fit another version of the model whatever its streams begin with; the model's fingerprint covers it."""

    def __post_init__(self) -> None:
        if type(self.name) is not str or not _NAME.fullmatch(self.name):
            raise InvalidStateSpec(
                f"a leaf cannot be called {self.name!r:.80}: expected 1 to 32 letters, digits, dots and underscores"
            )
        if type(self.shape) is not tuple or len(self.shape) > MAX_DIMENSIONS:
            raise InvalidStateSpec(f"the shape of leaf {self.name} must be a tuple of up to {MAX_DIMENSIONS} extents")
        for extent in self.shape:
            if type(extent) is not int or not 1 <= extent <= MAX_ROW_BYTES:
                raise InvalidStateSpec(
                    f"an extent of leaf {self.name} is {extent!r:.40}: expected 1 to {MAX_ROW_BYTES}"
                )
        if self.dtype not in DTYPES.values():
            raise InvalidStateSpec(f"leaf {self.name} is {self.dtype!s:.40}: expected {', '.join(DTYPES)}")
        self._check_initial()

    def _check_initial(self) -> None:
        value = self.initial
        if value is None:
            return
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InvalidStateSpec(f"the initial value of leaf {self.name} is {value!r:.40}: expected a finite number")
        with np.errstate(over="ignore"):
            fits = {
                "f": bool(np.isfinite(np.float64(value).astype(self.dtype))),
                "i": float(value).is_integer() and abs(value) < 2**53,
                "b": value in (0, 1),
            }[self.dtype.kind]
        if not fits:
            raise InvalidStateSpec(f"the initial value of leaf {self.name} is {value!r:.40}, which no {self.dtype} is")

    @property
    def elements(self) -> int:
        """The number of values of the leaf for each stream."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the leaf in a row."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """The leaves of a stream's state, in the order of the row.

    Raises:
        InvalidStateSpec: for no leaf, too many, two of one name, or a row of more than `MAX_ROW_BYTES`.
    """

    leaves: tuple[Leaf, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.leaves) <= MAX_LEAVES:
            raise InvalidStateSpec(f"a state has 1 to {MAX_LEAVES} leaves, this one {len(self.leaves)}")
        names = [leaf.name for leaf in self.leaves]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidStateSpec(f"two leaves are called {twice}")
        if self.row_bytes > MAX_ROW_BYTES:
            raise InvalidStateSpec(f"the state takes {self.row_bytes} bytes per stream, at most {MAX_ROW_BYTES}")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first byte of each leaf in a row."""
        offsets, end = [], 0
        for leaf in self.leaves:
            offsets.append(_up(end, leaf.dtype.itemsize))
            end = offsets[-1] + leaf.nbytes
        return tuple(offsets)

    @cached_property
    def row_bytes(self) -> int:
        """The number of bytes of a stream's state."""
        largest = max(leaf.dtype.itemsize for leaf in self.leaves)
        return _up(self.offsets[-1] + self.leaves[-1].nbytes, largest)

    def encode(self) -> list[list[Any]]:
        """Convert to plain values for JSON and msgpack: `[name, [extents], dtype, initial value]` for each leaf.

        The initial value is None if it is learned.
        """
        return [
            [leaf.name, list(leaf.shape), leaf.dtype.name, None if leaf.initial is None else float(leaf.initial)]
            for leaf in self.leaves
        ]

    @classmethod
    def decode(cls, value: Any) -> StateSpec:
        """Read the result of `encode` from an untrusted peer or file.

        Raises:
            InvalidStateSpec: naming the invalid part.
        """
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_LEAVES:
            raise InvalidStateSpec(f"a state must be a list of 1 to {MAX_LEAVES} leaves")
        leaves = []
        for item in value:
            if not isinstance(item, list | tuple) or len(item) != 4:
                raise InvalidStateSpec("a leaf must be [name, shape, dtype, initial value]")
            name, shape, dtype, initial = item
            if type(dtype) is not str or dtype not in DTYPES:
                raise InvalidStateSpec(f"leaf {name!r:.80} is {dtype!r:.40}: expected {', '.join(DTYPES)}")
            if not isinstance(shape, list | tuple):
                raise InvalidStateSpec(f"the shape of leaf {name!r:.80} must be a list of extents")
            leaves.append(Leaf(name, tuple(shape), DTYPES[dtype], initial))
        return cls(tuple(leaves))

    def with_learned(self, arrays: LeafArrays) -> StateSpec:
        """Return the specification with the initial arrays of its learned leaves."""
        return StateSpec(
            tuple(
                leaf if leaf.initial is not None else replace(leaf, learned=arrays[leaf.name].tobytes())
                for leaf in self.leaves
            )
        )

    def unpack(self, rows: U8) -> dict[str, npt.NDArray[Any]]:
        """The leaves of rows [N, row_bytes] as arrays [N, *shape]. They are views: writing to them changes the rows."""
        arrays = {}
        for leaf, offset in zip(self.leaves, self.offsets, strict=True):
            values = rows[:, offset : offset + leaf.nbytes].view(leaf.dtype)
            arrays[leaf.name] = values.reshape(len(rows), *leaf.shape)
        return arrays

    def pack(self, arrays: LeafArrays) -> U8:
        """Rows [N, row_bytes] from arrays [N, *shape], one for each leaf, of its dtype.

        Raises:
            ValueError: when a leaf is missing, unknown, or of another shape or dtype.
        """
        names = [leaf.name for leaf in self.leaves]
        if set(arrays) != set(names):
            raise ValueError(f"the state has the leaves {', '.join(names)}; these arrays are {', '.join(arrays)}")
        count = len(arrays[names[0]])
        for leaf in self.leaves:
            array = arrays[leaf.name]
            if array.shape != (count, *leaf.shape) or array.dtype != leaf.dtype:
                raise ValueError(
                    f"leaf {leaf.name} must be {leaf.dtype} {[count, *leaf.shape]}, "
                    f"not {array.dtype} {list(array.shape)}"
                )
        rows = np.zeros((count, self.row_bytes), np.uint8)
        for name, view in self.unpack(rows).items():
            view[...] = arrays[name]
        return rows

    def initial(self, count: int) -> U8:
        """Rows [count, row_bytes] of streams before their first frame.

        Raises:
            ValueError: when a leaf is learned and its array is unknown.
        """
        rows = self._filled(count, [leaf.initial or 0 for leaf in self.leaves])
        for leaf, view in zip(self.leaves, self.unpack(rows).values(), strict=True):
            if leaf.initial is None:
                if len(leaf.learned) != leaf.nbytes:
                    raise ValueError(
                        f"the model has learned what leaf {leaf.name} begins with, and only the server knows it"
                    )
                view[...] = np.frombuffer(leaf.learned, leaf.dtype).reshape(leaf.shape)
        return rows

    def missing(self, count: int) -> U8:
        """Rows [count, row_bytes] in place of missing states: NaN in floats, 0 in other leaves."""
        return self._filled(count, [math.nan if leaf.dtype.kind == "f" else 0 for leaf in self.leaves])

    def valid(self, rows: U8) -> Bool:
        """Whether each of the rows [N, row_bytes] is valid, bool [N]: finite floats, bools of 0 or 1, zero padding."""
        valid = np.ones(len(rows), np.bool_)
        padding = np.ones(self.row_bytes, np.bool_)
        for leaf, offset in zip(self.leaves, self.offsets, strict=True):
            part = rows[:, offset : offset + leaf.nbytes]
            padding[offset : offset + leaf.nbytes] = False
            if leaf.dtype.kind == "f":
                valid &= np.isfinite(part.view(leaf.dtype)).all(axis=1)
            elif leaf.dtype.kind == "b":
                valid &= (part <= 1).all(axis=1)
        if padding.any():
            valid &= ~rows[:, padding].any(axis=1)
        return valid

    def _filled(self, count: int, values: Sequence[float]) -> U8:
        row = np.zeros((1, self.row_bytes), np.uint8)
        for view, value in zip(self.unpack(row).values(), values, strict=True):
            view[...] = value
        return np.repeat(row, count, axis=0)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
