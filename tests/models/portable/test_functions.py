from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from instep.core.typing import F32, F64
from instep.models.portable import definition

Function = Callable[[F32], F32]

# Patterns of every exponent and both signs, all kinds of NaN, and the neighbours of each place where a formula changes.
_PLACES = (0.0, 2.0**-126, 0.5, 0.927734375, 1.0, 1.5707964, 20.0, 60.0, 87.0, 88.72284, 1e5, math.inf)
BITS = np.concatenate(
    [
        np.arange(0, 2**32, 262_139, dtype=np.uint64).astype(np.uint32),
        *(
            np.arange(-20, 21, dtype=np.int64).astype(np.uint32) + np.float32(place).view(np.uint32)
            for place in _PLACES
        ),
        *(
            np.arange(-20, 21, dtype=np.int64).astype(np.uint32) + np.float32(-place).view(np.uint32)
            for place in _PLACES
        ),
    ]
)
X: F32 = BITS.view(np.float32)

_EXACT: dict[str, tuple[Callable[[F64], Any], float, float, float]] = {
    "exp": (np.exp, 1.1, -87, math.inf),
    "expm1": (np.expm1, 1.4, -math.inf, math.inf),
    "log": (np.log, 0.9, -math.inf, math.inf),
    "log1p": (np.log1p, 1.6, -math.inf, math.inf),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 2.5, -87, math.inf),
    "tanh": (np.tanh, 2.6, -math.inf, math.inf),
    "erf": (lambda x: torch.special.erf(torch.from_numpy(x)).numpy(), 1.1, -math.inf, math.inf),
    "sin": (np.sin, 1.6, -7e13, 7e13),
    "cos": (np.cos, 1.6, -7e13, 7e13),
    "atan": (np.arctan, 1.5, -math.inf, math.inf),
}
"""In float64; how many ulp a function may be off at most, and from where to where."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def f4(*values: float) -> F32:
    return np.array(values, np.float32)


def function(name: str) -> Function:
    found: Function = getattr(definition, name)
    return found


@pytest.mark.parametrize("name", _EXACT)
def test_a_function_is_within_its_bound_of_float64(name: str) -> None:
    exactly, bound, least, most = _EXACT[name]
    x = X[np.isnan(X) | (np.clip(X, least, most) == X)]
    found, exact = function(name)(x), exactly(x.astype(np.float64))
    nearest = exact.astype(np.float32)
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(exact))
    assert np.array_equal(np.isinf(found), np.isinf(nearest))
    finite = np.isfinite(nearest)
    away = np.abs(found[finite] - exact[finite]) / np.spacing(np.abs(nearest[finite])).astype(np.float64)
    assert away.max() <= bound


def test_no_bit_of_any_function_has_changed() -> None:
    """The bits of `portable-1` are promised: recordings are verified by them."""
    digest = hashlib.sha256()
    for name in _EXACT:
        found = function(name)(X)
        digest.update(np.where(np.isnan(found), np.float32(np.nan), found).astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "e6d9aba2ad3107d7"
