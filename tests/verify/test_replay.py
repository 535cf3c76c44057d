from __future__ import annotations

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.recurrent.network import RecurrentNetwork
from instep.models.recurrent.step import RecurrentStep
from instep.verify.replay import replay_stepped, replay_whole
from tests.support.models import plain, whole
from tests.support.running import prepared
from tests.support.states import floats_of, rows_of

MODEL = plain(5, 16, layers=2)
LENGTHS = np.array([40, 40, 38, 35, 33, 33, 30, 21, 17, 16, 5, 1])
RANDOM = np.random.default_rng(0)
X: F32 = RANDOM.standard_normal((40, len(LENGTHS), 5)).astype(np.float32)
H: F32 = RANDOM.uniform(-1, 1, (len(LENGTHS), 2, 16)).astype(np.float32)
STATES: U8 = rows_of(H)
MOST_ROWS = 64
ACTIVE = (np.arange(40)[:, None] < LENGTHS).sum(axis=1)


class CountingNetwork(RecurrentNetwork):
    """Notes the rows of every step and call."""

    def __init__(self) -> None:
        super().__init__(MODEL, torch.device("cpu"))
        self.rows: list[int] = []

    def bind(self, rows: int) -> RecurrentStep:
        step = super().bind(rows)
        run = step.run

        def counted() -> None:
            self.rows.append(rows)
            run()

        step.run = counted  # type: ignore[method-assign]
        return step

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8]:
        self.rows.append(x.shape[1])
        return super().sequence(x, state)


@pytest.fixture
def network() -> CountingNetwork:
    return CountingNetwork()


def truth(row: int) -> tuple[F32, F32]:
    """torch's own GRU over one whole sequence."""
    return whole(MODEL, X[: LENGTHS[row], row], H[row], MOST_ROWS)


def test_stepping_takes_the_smallest_bucket(network: CountingNetwork) -> None:
    given = STATES.copy()
    replay_stepped(network, (4, 8, 16), X, STATES, ACTIVE)
    assert (given == STATES).all(), "the given states are not changed"
    assert network.rows == [4 if count <= 4 else 8 if count <= 8 else 16 for count in ACTIVE.tolist()]
    assert set(network.rows) == {4, 8, 16}


def test_stepping_gives_torchs_bits(network: CountingNetwork) -> None:
    certification = prepared(MODEL, MOST_ROWS).certification
    y, states = replay_stepped(network, certification.buckets, X, STATES, ACTIVE)
    for row, length in enumerate(LENGTHS):
        true_y, true_h = truth(row)
        np.testing.assert_allclose(y[:length, row], true_y, rtol=1e-4, atol=1e-6)
        if certification.exactness == "exact":
            assert y[:length, row].tobytes() == true_y.tobytes()
            assert states[row].tobytes() == true_h.tobytes()


def test_the_whole_sequence_is_one_call(network: CountingNetwork) -> None:
    replay_whole(network, (4, 8, 16), X, STATES)
    assert network.rows == [16]


def test_the_whole_sequence_has_torchs_bits(network: CountingNetwork) -> None:
    certification = prepared(MODEL, MOST_ROWS).certification
    y, states = replay_whole(network, certification.buckets, X, STATES)
    for row, length in enumerate(LENGTHS):
        true_y, true_h = truth(row)
        np.testing.assert_allclose(y[:length, row], true_y, rtol=1e-4, atol=1e-6)
        if certification.whole_sequence:
            assert y[:length, row].tobytes() == true_y.tobytes()
            assert length < 40 or states[row].tobytes() == true_h.tobytes()


def test_states_go_along_from_piece_to_piece(network: CountingNetwork) -> None:
    first_y, states = replay_stepped(network, (4, 8, 16), X[:15], STATES, ACTIVE[:15])
    second_y, states = replay_stepped(network, (4, 8, 16), X[15:], states, ACTIVE[15:])
    whole_y, whole_states = replay_stepped(network, (4, 8, 16), X, STATES, ACTIVE)
    assert states.tobytes() == whole_states.tobytes()
    assert np.concatenate([first_y, second_y]).tobytes() == whole_y.tobytes()


def test_frames_that_fill_a_bucket_give_the_same_and_are_not_changed(network: CountingNetwork) -> None:
    x, states, active = X[:, :8].copy(), STATES[:8].copy(), np.minimum(ACTIVE, 8)
    for replay, padded in (
        (replay_stepped(network, (8,), x, states, active), replay_stepped(network, (16,), x, states, active)),
        (replay_whole(network, (8,), x, states), replay_whole(network, (16,), x, states)),
    ):
        assert network.rows[-1] == 16
        assert 8 in network.rows
        np.testing.assert_allclose(replay[0][:16], padded[0][:16], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(floats_of(replay[1], 32), floats_of(padded[1], 32), rtol=1e-4, atol=1e-6)
    assert x.tobytes() == X[:, :8].tobytes()
    assert states.tobytes() == STATES[:8].tobytes()
