from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from instep.models.base import Reference
from instep.models.recurrent.reference import RecurrentReference
from instep.replay.bound import (
    FACTOR,
    FLOOR,
    LARGE,
    RUNS,
    ErrorBound,
    absolute_error,
    largest_errors,
)
from tests.support.recordings import gru_description
from tests.support.ulp import ulp_distance

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "truth", "error"),
    [
        (1.5, 1.25, 0.25),
        (INF, INF, 0.0),
        (INF, 1e39, 0.0),  # beyond float32: infinity is as near as float32 comes
        (-INF, 1e39, INF),
        (INF, 1.0, INF),
        (1.0, INF, INF),
        (NAN, NAN, 0.0),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
    ],
)
def test_absolute_error(value: float, truth: float, error: float) -> None:
    assert absolute_error(np.array([value], np.float32), np.array([truth])).tolist() == [error]


@pytest.mark.parametrize("block_bytes", [1, 200, 2**20])
def test_the_largest_error_of_each_frame(block_bytes: int) -> None:
    random = np.random.default_rng(0)
    truth = random.standard_normal((7, 3, 4))
    values = (truth + random.uniform(-1e-3, 1e-3, truth.shape)).astype(np.float32)
    values[1, 2, 3], values[2, 0, 0], truth[2, 0, 0] = NAN, INF, 1e39
    values[4, 1, 1] = truth[4, 1, 1] = NAN
    truth[5, 0, 2] = -INF
    expected = [[max(map(single_error, values[t, row], truth[t, row])) for row in range(3)] for t in range(7)]
    assert largest_errors(values, truth, block_bytes).tolist() == expected
    assert np.isinf(expected).sum() == 2


def single_error(value: np.float32, truth: np.float64) -> float:
    return float(absolute_error(np.array([value]), np.array([truth]))[0])


class Given:
    """Stands for the reference in float32: its outputs are given, by timestep or by timestep and stream."""

    def __init__(self, outputs: Any, state: float | list[float] = 0.0) -> None:
        self.outputs = np.array(outputs, np.float32)
        self.state = np.array(state, np.float32)
        self.frames: list[npt.NDArray[np.float32]] = []

    def run(self, x: Any, state: Any, active: Any) -> tuple[Any, Any]:
        self.frames.append(x)
        now, self.outputs = self.outputs[: len(x)], self.outputs[len(x) :]
        assert active.tolist() == [x.shape[1]] * len(x)
        rows = x.shape[1] // RUNS
        by_stream = np.broadcast_to(now.reshape(len(x), -1), (len(x), rows))
        states = np.broadcast_to(self.state.reshape(-1), (rows,))
        return np.repeat(by_stream, RUNS, axis=1)[:, :, None], {"h": np.repeat(states, RUNS)[:, None, None]}


def bound_of(given: Given, rows: int, state: float = 0.0) -> ErrorBound:
    return ErrorBound(cast(Reference, given), {"h": np.full((rows, 1, 1), state, np.float32)})


def test_the_bound_is_as_stated() -> None:
    truth = np.array([1.0, -4.0, 0.5, 0.25])[:, None, None]
    bound = bound_of(Given([1.0, -4.0 + 2**-10, 0.5, 9.0], state=8.0), 1)
    one = np.ones(2, np.int64)
    x = np.full((2, 1, 3), 0.5, np.float32)
    limits = bound.outputs(x, truth[:2], np.array([[True], [True]]), one).distance
    relative = 2**-12  # of a scale of 4
    assert limits[:, 0].tolist() == [FLOOR * 1, 4 * (FACTOR * relative + FLOOR)]
    later = bound.outputs(x, truth[2:], np.array([[True], [False]]), one)
    assert later.distance[:, 0].tolist() == [limits[1, 0]] * 2, "errors last, and rows without a frame do not count"
    assert not later.lossy.any()
    assert bound.states({"h": np.full((1, 1, 1), 8.0)})["h"].distance.tolist() == [8 * (FACTOR * relative + FLOOR)]
    assert bound.states({"h": np.full((1, 1, 1), 16.0)})["h"].distance.tolist() == [16 * (FACTOR * 0.5 + FLOOR)]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_every_stream_has_copies_one_unit_off(rows: int) -> None:
    given = Given([0.0])
    x = np.random.default_rng(0).standard_normal((1, rows, 40)).astype(np.float32)
    bound_of(given, rows).outputs(x, np.zeros((1, rows, 1)), np.ones((1, rows), np.bool_), np.array([rows]))
    frames = given.frames[0].reshape(rows, RUNS, 40)
    assert (frames[:, 0] == x[0]).all()
    apart = np.abs(ulp_distance(frames, np.broadcast_to(x[0][:, None], frames.shape).copy()))
    assert (apart[:, 1:] == 1).all()
    assert len(np.unique(frames.reshape(-1, 40), axis=0)) == rows * RUNS


@pytest.mark.parametrize("beside", [[1e30, NAN], [INF, 7.0], [0.0, 0.0]])
def test_no_stream_influences_the_bound_of_another(beside: list[float]) -> None:
    alone, together = bound_of(Given([1.0, 1.0], state=2.0), 1), bound_of(Given([[1, b] for b in beside], [2, 9]), 2)
    truth = np.array([[[1.0]], [[1.0 + 2**-20]]])
    other = np.array([[[3e38]], [[1.0]]])
    x = np.full((2, 1, 3), 0.5, np.float32)
    huge = np.full((2, 1, 3), np.finfo(np.float32).max)
    valid = np.ones((2, 2), np.bool_)
    mine = alone.outputs(x, truth, valid[:, :1], np.ones(2, np.int64))
    ours = together.outputs(
        np.concatenate([x, huge], axis=1), np.concatenate([truth, other], axis=1), valid, np.full(2, 2)
    )
    assert ours.distance[:, 0].tolist() == mine.distance[:, 0].tolist()
    assert ours.lossy.tolist() == [[False, True]] * 2
    both = together.states({"h": np.full((2, 1, 1), 2.5)})
    assert both["h"].distance[0] == alone.states({"h": np.full((1, 1, 1), 2.5)})["h"].distance[0]


@pytest.mark.parametrize("cause", ["frame", "state", "overflow"])
def test_values_too_large_for_float32_make_a_stream_lossy_from_there_on(cause: str) -> None:
    large = LARGE if cause == "frame" else 0.5
    x = np.array([0.5, 0.5, -large, 0.5], np.float32)[:, None, None]
    outputs = [0.0, 0.0, INF if cause == "overflow" else 0.0, 0.0]
    bound = bound_of(Given(outputs), 1, state=-LARGE if cause == "state" else 0.5)
    limits = bound.outputs(x, np.zeros((4, 1, 1)), np.ones((4, 1), np.bool_), np.ones(4, np.int64))
    assert limits.lossy[:, 0].tolist() == [cause == "state"] * 2 + [True] * 2
    assert (limits.distance == FLOOR).all(), "an overflow widens no bound"
    assert bound.states({"h": np.zeros((1, 1, 1))})["h"].lossy.tolist() == [True]


# Strength 1 is torch's own initialisation. At 3 and 8 a state is amplified: rounding grows until nothing of the
# trajectory is left, which is no fault of anyone's, and the bound grows with it.
@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("features", "hidden", "layers"), [(3, 4, 1), (16, 64, 1), (8, 24, 3), (2, 1, 1)])
@pytest.mark.parametrize("together", [1, 24])
def test_torch_in_float32_keeps_within_it(
    strength: float, features: int, hidden: int, layers: int, together: int
) -> None:
    torch.manual_seed(hidden)
    gru = torch.nn.GRU(features, hidden, num_layers=layers)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(strength)
    frames = torch.randn(200, 24, features)
    with torch.inference_mode():
        outputs, states = gru(frames)
    weights = {f"gru.{name}": parameter.detach().numpy() for name, parameter in gru.named_parameters()}
    truth = RecurrentReference(gru_description(gru), weights, np.float64)
    rounded = RecurrentReference(gru_description(gru), weights, np.float32)
    active, valid = np.full(200, together), np.ones((200, together), np.bool_)
    for first in range(0, 8, together):
        some = slice(first, first + together)
        h, x = np.zeros((together, layers, hidden), np.float32), frames[:, some].numpy()
        true_y, after = truth.run(x, {"h": h}, active)
        bound = ErrorBound(rounded, {"h": h})
        limits = bound.outputs(x, true_y, valid, active).distance
        assert (absolute_error(outputs[:, some].numpy(), true_y).max(axis=2) <= limits).all()
        state_error = absolute_error(states[:, some].numpy().swapaxes(0, 1), after["h"]).max(axis=(1, 2))
        assert (state_error <= bound.states(after)["h"].distance).all()
        if strength <= 1:
            assert limits.max() < 1e-4, "for a network as trained, it is narrow"
