"""States as users see them, and as rows of bytes.

Where a model's state is one float32 leaf, as a GRU's is, a state is that array, float32 of the leaf's shape. Any other
state is a dict of arrays by the names of the leaves. States of N streams have N as their first extent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.arrays import as_array, float32_copy
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.state_spec import U8, Leaf, StateSpec

State: TypeAlias = Any
"""One array, or a dict of arrays by leaf; see above."""


def is_one_array(spec: StateSpec) -> bool:
    """Whether a state is one array rather than a dict of them."""
    return len(spec.leaves) == 1 and spec.leaves[0].dtype == np.float32


def state_rows(state: State, spec: StateSpec, count: int | None) -> U8:
    """Turn a user's states of `count` streams, or the state of one if None, into rows of bytes [N, row_bytes].

    Raises:
        InvalidInput: naming the shape or leaf that does not fit.
    """
    leading = () if count is None else (count,)
    if is_one_array(spec):
        if isinstance(state, Mapping):
            raise InvalidInput(f"a state of this model is one array of shape {list(spec.leaves[0].shape)}, not a dict")
        given = {spec.leaves[0].name: state}
    elif isinstance(state, Mapping) and set(state) == {leaf.name for leaf in spec.leaves}:
        given = dict(state)
    else:
        names = ", ".join(leaf.name for leaf in spec.leaves)
        raise InvalidInput(f"a state of this model must be a dict of arrays called {names}")
    arrays = {leaf.name: _leaf(given[leaf.name], leaf, (*leading, *leaf.shape)) for leaf in spec.leaves}
    return spec.pack({leaf.name: arrays[leaf.name].reshape(-1, *leaf.shape) for leaf in spec.leaves})


def as_state(rows: U8, spec: StateSpec, *, single: bool) -> State:
    """Rows of bytes [N, row_bytes] as a user gets them: states of N streams, or the state of the only one.

    The arrays are copies, and arrays also where they hold one value.
    """
    leaves = {name: np.array(array[0] if single else array, order="C") for name, array in spec.unpack(rows).items()}
    return leaves[spec.leaves[0].name] if is_one_array(spec) else leaves


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
