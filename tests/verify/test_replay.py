from __future__ import annotations

import numpy as np
import torch

from instep.core.typing import F32, U8
from instep.models.network import PortableNetwork
from instep.verify.replay import replay_stepped
from tests.support.models import plain, torch_gru, whole
from tests.support.states import rows_of

MODEL = plain(5, 16, layers=2)
NETWORK = PortableNetwork(MODEL)
LENGTHS = np.array([40, 40, 38, 35, 33, 33, 30, 21, 17, 16, 5, 1])
RANDOM = np.random.default_rng(0)
X: F32 = RANDOM.standard_normal((40, len(LENGTHS), 5)).astype(np.float32)
H: F32 = RANDOM.uniform(-1, 1, (len(LENGTHS), 2, 16)).astype(np.float32)
STATES: U8 = rows_of(H)
ACTIVE = (np.arange(40)[:, None] < LENGTHS).sum(axis=1)


def test_stepping_gives_the_bits_of_the_definition_and_the_values_of_torch() -> None:
    given, after = STATES.copy(), np.zeros((40, *STATES.shape), np.uint8)
    y, states = replay_stepped(NETWORK, X, STATES, ACTIVE, after)
    assert (given == STATES).all(), "the given states are not changed"
    module = torch_gru(MODEL)
    for row, length in enumerate(LENGTHS):
        true_y, true_h = whole(MODEL, X[:length, row], H[row])
        assert y[:length, row].tobytes() == true_y.tobytes()
        assert states[row].tobytes() == after[length - 1, row].tobytes() == true_h.tobytes()
        near = module(torch.from_numpy(X[:length, row]), torch.from_numpy(H[row]))[0]
        np.testing.assert_allclose(y[:length, row], near.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_states_are_carried_from_piece_to_piece() -> None:
    first_y, states = replay_stepped(NETWORK, X[:15], STATES, ACTIVE[:15])
    second_y, states = replay_stepped(NETWORK, X[15:], states, ACTIVE[15:])
    whole_y, whole_states = replay_stepped(NETWORK, X, STATES, ACTIVE)
    assert states.tobytes() == whole_states.tobytes()
    assert np.concatenate([first_y, second_y]).tobytes() == whole_y.tobytes()
