from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from instep_client import arguments
from instep_client.protocol.errors import InvalidInput


class OnGpu:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("this array is on a GPU")


@pytest.mark.parametrize(
    "x",
    [
        [1, 2, 3],
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        np.array([1, 2, 3], np.uint8),
        np.array([1, 2, 3], ">f4"),
    ],
)
def test_numbers_become_a_contiguous_float32_copy(x: Any) -> None:
    copy = arguments.float32_copy(x, "x")
    assert copy.dtype == np.dtype("=f4")
    assert copy.flags.c_contiguous
    assert copy.flags.owndata
    assert copy.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "x",
    [
        [1j],
        [2**80],
        {"a": 1},
        OnGpu(),
    ],
)
def test_what_is_not_real_numbers_is_refused(x: Any) -> None:
    with pytest.raises(InvalidInput):
        arguments.float32_copy(x, "x")


def test_infinity_passes_but_not_when_float32_makes_it() -> None:
    assert np.isinf(arguments.float32_copy([np.inf, 1.0], "x")[0])
    assert np.isnan(arguments.float32_copy(np.array([np.nan]), "x")[0])
    with pytest.raises(InvalidInput):
        arguments.float32_copy([1e39], "x")
    with pytest.raises(InvalidInput):
        arguments.float32_copy([np.inf, -1e39], "x")


@pytest.mark.parametrize(("shape", "prefix"), [((3,), ()), ((1, 3), (1,)), ((5, 3), (5,))])
def test_a_streams_frames(shape: tuple[int, ...], prefix: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    frames, answer = arguments.stream_frames(x, 3)
    assert answer == prefix
    assert frames.shape == (x.size // 3, 1, 3)
    assert frames.ravel().tolist() == x.ravel().tolist()


@pytest.mark.parametrize("shape", [(), (2,), (2, 4), (0, 3), (1, 1, 3)])
def test_other_shapes_of_a_stream_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        arguments.stream_frames(np.zeros(shape), 3)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize(("shape", "prefix"), [((2, 3), (2,)), ((1, 2, 3), (1, 2)), ((5, 2, 3), (5, 2))])
def test_a_groups_frames(shape: tuple[int, ...], prefix: tuple[int, ...]) -> None:
    frames, answer = arguments.group_frames(np.ones(shape), 2, 3)
    assert answer == prefix
    assert frames.shape == (int(np.prod(shape)) // 6, 2, 3)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (0, 2, 3), (1, 1, 2, 3)])
def test_other_shapes_of_a_group_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput):
        arguments.group_frames(np.zeros(shape), 2, 3)


def test_rows_are_distinct_indices() -> None:
    assert arguments.row_indices([2, 0], 3).tolist() == [2, 0]
    assert arguments.row_indices(np.array([1], np.uint8), 3).dtype == np.int64


@pytest.mark.parametrize("rows", [[], [True, False, True], [1, 1], [3]])
def test_other_rows_are_refused(rows: Any) -> None:
    with pytest.raises(InvalidInput):
        arguments.row_indices(rows, 3)
