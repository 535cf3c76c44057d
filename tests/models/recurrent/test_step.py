"""Whether the step by hand is used only where its bits are those of `torch.gru`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch

from instep.models.certify import certify
from instep.models.folder import make_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep.models.recurrent.network import GruNetwork
from instep.models.recurrent.step import GruKernel, GruStep
from tests.support.models import stepped

CPU = torch.device("cpu")
CANDIDATES = (4, 8, 16, 24, 32, 48, 64)
PLAIN = GruDescription(features=5, gru=GruLayers(hidden_size=16, num_layers=2))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def of_size(hidden_size: int) -> GruNetwork:
    description = GruDescription(features=5, gru=GruLayers(hidden_size=hidden_size))
    return GruNetwork(make_model(description, "random", name="fused", seed=1), CPU)


def nudge(values: torch.Tensor) -> None:
    """To the next float32 above, in place."""
    values.copy_(torch.nextafter(values, torch.tensor(torch.inf)))


Run: TypeAlias = Callable[[GruStep], None]


def like_torch(step: GruStep) -> None:
    """A step with the bits of torch's on every machine."""
    cells, step._cells = step._cells, []
    GRU_STEP_RUN(step)
    step._cells = cells


GRU_STEP_RUN = GruStep.run


def by_hand_becomes(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Steps by hand run `run` instead."""
    monkeypatch.setattr(GruStep, "run", lambda step: GRU_STEP_RUN(step) if step.kernel == "torch" else run(step))


@pytest.mark.parametrize("bucket", [4, 32, 64])
def test_with_other_bits_it_is_left_out(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    network = GruNetwork(make_model(PLAIN, "random", name="fused", seed=1), CPU)

    def other(step: GruStep) -> None:
        like_torch(step)
        if len(step.y) == bucket:
            nudge(step.y[bucket - 1, -1:])

    network.may_step_by_hand = False
    expected = certify(network, CANDIDATES)
    network.may_step_by_hand = True
    by_hand_becomes(monkeypatch, other)
    assert certify(network, CANDIDATES) == expected
    assert network.kernel == "torch"


def test_with_the_bits_of_torch_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = GruNetwork(make_model(PLAIN, "random", name="fused", seed=1), CPU)
    by_hand_becomes(monkeypatch, like_torch)
    certify(network, CANDIDATES)
    assert network.kernel == "fused"
    assert network.bind(4).kernel == "fused"


def test_where_only_the_biases_make_a_difference_they_stay_in_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    network = GruNetwork(make_model(PLAIN, "random", name="fused", seed=1), CPU)

    def other(step: GruStep) -> None:
        like_torch(step)
        if step.kernel == "fused":
            nudge(step.y[-1, -1:])

    by_hand_becomes(monkeypatch, other)
    certify(network, CANDIDATES)
    assert network.kernel == "addmm"


@pytest.mark.parametrize("bucket", [4, 32, 64])
def test_with_bits_that_seldom_differ_it_is_left_out(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    """The first batches of a bucket do not show it."""
    network = GruNetwork(make_model(PLAIN, "random", name="fused", seed=1), CPU)
    values = 0

    def other(step: GruStep) -> None:
        nonlocal values
        like_torch(step)
        if len(step.y) == bucket:
            values += step.y.numel()
            if values > 2000:
                nudge(step.y[-1, -1:])

    by_hand_becomes(monkeypatch, other)
    certify(network, CANDIDATES)
    assert network.kernel == "torch"


@pytest.mark.parametrize("hidden_size", [1, 8, 15, 17, 24, 31, 33])
def test_in_widths_that_do_not_fill_vectors_it_is_left_out_untried(
    monkeypatch: pytest.MonkeyPatch, hidden_size: int
) -> None:
    def tried(step: GruStep) -> None:
        raise AssertionError

    by_hand_becomes(monkeypatch, tried)
    network = of_size(hidden_size)
    certify(network, CANDIDATES)
    assert network.kernel == "torch"


@pytest.mark.parametrize("hidden_size", [16, 32, 48, 64])
def test_in_other_widths_it_is_used_only_where_no_row_of_many_others_differs(hidden_size: int) -> None:
    network = of_size(hidden_size)
    certify(network, CANDIDATES)
    was_certified = network.kernel == "fused"
    random = np.random.default_rng(7)
    x = random.standard_normal((200, 1, 64, 5)).astype(np.float32)
    h = random.uniform(-1, 1, (200, 1, 64, hidden_size)).astype(np.float32)
    answers = []
    kernels: tuple[GruKernel, ...] = ("torch", "fused")
    for network.kernel in kernels:
        answers.append(np.stack([stepped(network, *rows)[0] for rows in zip(x, h, strict=True)]))
    assert answers[0].tobytes() == answers[1].tobytes() or not was_certified
