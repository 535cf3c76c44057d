"""States as users see them, and as rows of bytes.

A state is a dict of arrays by the names of the leaves: of a GRU, `h`; of an LSTM, `h` and `c`. States of N streams have
N as their first extent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.arrays import as_array, float32_copy
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.state_spec import U8, Leaf, StateSpec

State: TypeAlias = dict[str, npt.NDArray[Any]]
GivenState: TypeAlias = Mapping[str, npt.ArrayLike] | npt.ArrayLike
"""What users may give for a state: of a model with one leaf also the array alone."""


def state_rows(state: GivenState, spec: StateSpec, count: int | None) -> U8:
    """Turn a user's states of `count` streams, or the state of one if None, into rows of bytes [N, row_bytes].

    Raises:
        InvalidInput: naming the shape or leaf that does not fit.
    """
    leading = () if count is None else (count,)
    if not isinstance(state, Mapping) and len(spec.leaves) == 1:
        state = {spec.leaves[0].name: state}
    if not isinstance(state, Mapping) or set(state) != {leaf.name for leaf in spec.leaves}:
        names = ", ".join(leaf.name for leaf in spec.leaves)
        raise InvalidInput(f"a state of this model must be a dict of arrays called {names}")
    arrays = {leaf.name: _leaf(state[leaf.name], leaf, (*leading, *leaf.shape)) for leaf in spec.leaves}
    return spec.pack({leaf.name: arrays[leaf.name].reshape(-1, *leaf.shape) for leaf in spec.leaves})


def as_state(rows: U8, spec: StateSpec, *, single: bool) -> State:
    """Rows of bytes [N, row_bytes] as a user gets them: states of N streams, or the state of the only one.

    The arrays are copies, and arrays also where they hold one value.
    """
    return {name: np.array(array[0] if single else array, order="C") for name, array in spec.unpack(rows).items()}


def _leaf(x: npt.ArrayLike, leaf: Leaf, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if leaf.dtype == np.float32:
        array: npt.NDArray[Any] = float32_copy(x, f"the state's leaf {leaf.name}")
    else:
        array = as_array(x, f"the state's leaf {leaf.name}", "an array")
        if not np.can_cast(array.dtype, leaf.dtype, "safe"):
            raise InvalidInput(f"the state's leaf {leaf.name} must be {leaf.dtype}, not {array.dtype}")
        array = array.astype(leaf.dtype)
    if array.shape != shape:
        raise InvalidInput(
            f"the state's leaf {leaf.name} must have shape {list(shape)}; this array has shape {list(array.shape)}"
        )
    return array
