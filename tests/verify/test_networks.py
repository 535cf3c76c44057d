from __future__ import annotations

import threading

import pytest
import torch

from instep.models.folder import make_model
from instep.models.gru.description import GruDescription, GruLayers
from instep.models.gru.network import GruNetwork
from instep.verify.networks import Networks


def two() -> list[GruNetwork]:
    description = GruDescription(features=3, gru=GruLayers(hidden_size=4, num_layers=2))
    model = make_model(description, "random", name="two")
    return [GruNetwork(model, torch.device("cpu")) for _ in range(2)]


def test_nobody_gets_one_that_is_in_use() -> None:
    given = two()
    networks = Networks(given)
    assert (networks.state_layers, networks.state_size) == (2, 4)
    with networks.one() as one, networks.one() as other:
        assert {one, other} == set(given)
        third = threading.Event()

        def wait_for_one() -> None:
            with networks.one():
                third.set()

        thread = threading.Thread(target=wait_for_one)
        thread.start()
        assert not third.wait(0.05)
    thread.join()
    assert third.is_set()


def test_one_is_given_back_after_a_failure() -> None:
    networks = Networks(two()[:1])
    with pytest.raises(ZeroDivisionError), networks.one():
        raise ZeroDivisionError
    with networks.one():
        pass
