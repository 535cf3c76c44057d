from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from instep.models.base import Reference
from instep.models.gru.reference import GruReference
from instep.models.ulp import ulp_distance
from instep.verify import bound as bounds
from instep.verify.bound import FACTOR, FLOOR, ErrorBound, LeastBound, absolute_error, largest_errors
from tests.support.recordings import gru_description

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
def test_the_largest_error_of_each_frame(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(bounds, "BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(0)
    truth = random.standard_normal((7, 3, 4))
    values = (truth + random.uniform(-1e-3, 1e-3, truth.shape)).astype(np.float32)
    values[1, 2, 3], values[2, 0, 0], truth[2, 0, 0] = NAN, INF, 1e39
    values[4, 1, 1] = truth[4, 1, 1] = NAN
    truth[5, 0, 2] = -INF
    expected = [[max(map(single_error, values[t, row], truth[t, row])) for row in range(3)] for t in range(7)]
    assert largest_errors(values, truth).tolist() == expected
    assert np.isinf(expected).sum() == 2


def single_error(value: np.float32, truth: np.float64) -> float:
    return float(absolute_error(np.array([value]), np.array([truth]))[0])


class Given:
    """Stands for the reference in float32: answers with given outputs, one timestep after another."""

    def __init__(self, outputs: list[float], state: float) -> None:
        self.outputs = np.array(outputs, np.float32)
        self.state = state
        self.frames: list[npt.NDArray[np.float32]] = []

    def run(self, x: Any, state: Any, active: Any) -> tuple[Any, Any]:
        self.frames.append(x)
        now, self.outputs = self.outputs[: len(x)], self.outputs[len(x) :]
        assert active.tolist() == [x.shape[1]] * len(x)
        return np.broadcast_to(now[:, None, None], (len(x), x.shape[1], 1)), {"h": np.full_like(state["h"], self.state)}


def bound_of(given: Given, rows: int) -> ErrorBound:
    return ErrorBound(cast(Reference, given), np.zeros((1, rows, 1), np.float32))


def test_the_bound_is_as_stated() -> None:
    truth = np.array([1.0, -4.0, 0.5, 0.25])[:, None, None]
    bound = bound_of(Given([1.0, -4.0 + 2**-10, 0.5, 9.0], state=8.0), 1)
    one = np.ones(2, np.int64)
    x = np.full((2, 1, 3), 0.5, np.float32)
    limits = bound.of_outputs(truth[:2], bound.run(x, one), np.array([[True], [True]]))
    relative = 2**-12  # of a scale of 4
    assert limits[:, 0].tolist() == [FLOOR * 1, 4 * (FACTOR * relative + FLOOR)]
    later = bound.of_outputs(truth[2:], bound.run(x, one), np.array([[True], [False]]))
    assert later[:, 0].tolist() == [limits[1, 0]] * 2, "errors last, and rows without a frame do not count"
    assert bound.of_states(np.full((1, 1, 1), 8.0)).tolist() == [8 * (FACTOR * relative + FLOOR)]
    assert bound.of_states(np.full((1, 1, 1), 16.0)).tolist() == [16 * (FACTOR * 0.5 + FLOOR)]


def test_the_least_bound_is_that_of_runs_without_an_error() -> None:
    truth = np.array([[1.0, -4.0], [NAN, 8.0], [-2.0, 16.0], [0.25, 0.0]])[:, :, None]
    valid = np.array([[True, True], [True, True], [True, False], [True, False]])
    least = LeastBound(2)
    first, second = least.of_outputs(truth[:2], valid[:2]), least.of_outputs(truth[2:], valid[2:])
    assert (np.concatenate([first, second]) / FLOOR).tolist() == [[1, 4], [1, 8], [2, 8], [2, 8]]
    assert (least.of_states(np.array([[[0.5], [3.0]], [[-2.0], [INF]]])) / FLOOR).tolist() == [2, 3]


def test_the_least_bound_is_never_above_the_bound() -> None:
    truth = np.random.default_rng(0).standard_normal((50, 9, 4)) * np.arange(1, 51)[:, None, None]
    valid = np.ones((50, 9), np.bool_)
    bound = bound_of(Given([0.0] * 50, state=0.0), 9)
    rounded = (truth + 1e-6).astype(np.float32)[:, :, None]
    assert (LeastBound(9).of_outputs(truth, valid) < bound.of_outputs(truth, rounded, valid)).all()
    state = truth[:1]
    assert (LeastBound(9).of_states(state) < bound.of_states(np.zeros((1, 9, 1)) + state[:, :, :1])).all()


@pytest.mark.parametrize(("rows", "copies"), [(1, 8), (3, 3), (7, 2), (8, 1), (100, 1)])
def test_few_streams_have_copies_one_unit_off(rows: int, copies: int) -> None:
    given = Given([0.0], state=0.0)
    x = np.random.default_rng(0).standard_normal((1, rows, 40)).astype(np.float32)
    rounded = bound_of(given, rows).run(x, np.array([rows]))
    assert rounded.shape == (1, rows, copies, 1)
    frames = given.frames[0].reshape(rows, copies, 40)
    assert (frames[:, 0] == x[0]).all()
    apart = np.abs(ulp_distance(frames, np.broadcast_to(x[0][:, None], frames.shape).copy()))
    assert (apart[:, 1:] == 1).all()
    assert len(np.unique(frames.reshape(-1, 40), axis=0)) == rows * copies


def test_an_overflow_beside_a_stream_does_not_widen_its_bound() -> None:
    truth = np.array([[[1.0], [3e38]]])
    bound = bound_of(Given([np.inf], state=np.inf), 2)
    largest = np.finfo(np.float32).max
    rounded = bound.run(np.full((1, 2, 3), largest, np.float32), np.array([2]))
    assert bound.of_outputs(truth, rounded, np.ones((1, 2), np.bool_)).tolist() == [[FLOOR, FLOOR * 3e38]]
    assert bound.of_states(np.array([[[1.0], [3e38]]])).tolist() == [FLOOR, FLOOR * 3e38]


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
    truth = GruReference(gru_description(gru), weights, np.float64)
    rounded = GruReference(gru_description(gru), weights, np.float32)
    active, valid = np.full(200, together), np.ones((200, together), np.bool_)
    for first in range(0, 24, together):
        some = slice(first, first + together)
        h, x = np.zeros((layers, together, hidden), np.float32), frames[:, some].numpy()
        true_y, after = truth.run(x, {"h": h.swapaxes(0, 1)}, active)
        true_h = after["h"].swapaxes(0, 1)
        bound = ErrorBound(rounded, h)
        limits = bound.of_outputs(true_y, bound.run(x, active), valid)
        assert (absolute_error(outputs[:, some].numpy(), true_y).max(axis=2) <= limits).all()
        state_error = absolute_error(states[:, some].numpy(), true_h).max(axis=(0, 2))
        assert (state_error <= bound.of_states(true_h)).all()
        if strength <= 1:
            assert limits.max() < 1e-4, "for a network as trained, it is narrow"
