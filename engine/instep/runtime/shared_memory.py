"""Arrays that this process and those it forks have in common."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def shared_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Zeros that processes forked later read and write, too. Pages that nobody touches take no memory.

    Raises:
        MemoryError: when there is no room for it.
    """
    count = math.prod(shape)
    try:
        memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"no memory for an array of shape {list(shape)}: {error}") from None
    return np.frombuffer(memory, dtype, count).reshape(shape)
