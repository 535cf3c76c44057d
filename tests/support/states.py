"""States as rows of bytes, from and to float32 arrays: those of models whose state is one float32 leaf."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from instep_client.protocol.state_spec import DTYPES, U8, Leaf, StateSpec

F32 = npt.NDArray[np.float32]


def gru_state(layers: int, size: int) -> StateSpec:
    """The specification of a GRU's state."""
    return StateSpec((Leaf("h", (layers, size), DTYPES["float32"]),))


def rows_of(states: npt.ArrayLike) -> U8:
    """States [N, …] as rows [N, row_bytes]."""
    array: npt.NDArray[Any] = np.ascontiguousarray(states, "<f4")
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)


def floats_of(rows: U8, *shape: int) -> F32:
    """Rows [N, row_bytes] as states [N, *shape]."""
    return np.ascontiguousarray(rows).view("<f4").reshape(len(rows), *shape)
