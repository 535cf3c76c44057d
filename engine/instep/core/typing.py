"""Array types of the core."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
I32: TypeAlias = npt.NDArray[np.int32]
I64: TypeAlias = npt.NDArray[np.int64]
U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]
Bool: TypeAlias = npt.NDArray[np.bool_]


Int: TypeAlias = int | np.integer[Any]
"""An integer in a kernel: Python's int if kernels are not compiled, otherwise a machine integer."""


def float32_zeros(shape: tuple[int, ...]) -> F32:
    """Zeros; untouched pages use no memory."""
    return np.zeros(shape, np.float32)
