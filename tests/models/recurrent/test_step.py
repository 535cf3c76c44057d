"""Whether the step by hand is used only where its bits are those of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from instep.models.certify import certify
from instep.models.folder import make_model
from instep.models.recurrent.cell import BY_HAND, Kernel
from instep.models.recurrent.network import RecurrentNetwork
from instep.models.recurrent.step import RecurrentStep
from instep.models.registry import parse_description
from instep.models.stepping import step_rows
from tests.support.torch_network import random_rows

CPU = torch.device("cpu")
CANDIDATES = (4, 8, 16, 24, 32, 48, 64)
PROBES = 512
"""As many as `certify` compares of these networks."""
SPOILED = [("gru", 4), ("gru", 64), ("rnn", 32), ("lstm", 4), ("lstm", 64)]
"""Kinds, and the bucket of theirs in which a step by hand has other bits: the first, one in the middle, the last."""
KINDS = ("gru", "lstm", "rnn")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def of_size(kind: str, hidden_size: int, layers: int = 1) -> RecurrentNetwork:
    fields = {"kind": kind, "features": 5, kind: {"hidden_size": hidden_size, "num_layers": layers}}
    return RecurrentNetwork(make_model(parse_description(fields), "random", name="fused", seed=1), CPU)


def plain(kind: str) -> RecurrentNetwork:
    return of_size(kind, 16, layers=2)


def nudge(values: torch.Tensor) -> None:
    """To the next float32 above, in place."""
    values.copy_(torch.nextafter(values, torch.tensor(torch.inf)))


Run: TypeAlias = Callable[[RecurrentStep], None]


def like_torch(step: RecurrentStep) -> None:
    """A step with the bits of torch's on every machine."""
    cells, step._cells = step._cells, []
    STEP_RUN(step)
    step._cells = cells


STEP_RUN = RecurrentStep.run


def by_hand_becomes(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Steps by hand run `run` instead."""
    monkeypatch.setattr(RecurrentStep, "run", lambda step: run(step) if step.kernel in BY_HAND else STEP_RUN(step))


@pytest.mark.parametrize(("kind", "bucket"), SPOILED)
def test_with_other_bits_it_is_left_out(monkeypatch: pytest.MonkeyPatch, kind: str, bucket: int) -> None:
    network = plain(kind)

    def other(step: RecurrentStep) -> None:
        like_torch(step)
        if len(step.y) == bucket:
            nudge(step.y[bucket - 1, -1:])

    by_hand_becomes(monkeypatch, other)
    network.select_step(CANDIDATES, PROBES)
    # For an LSTM, a size that is not among those that are tried first leaves torch's own step without oneDNN.
    assert network.kernel in (("torch", "native") if kind == "lstm" else ("torch",))
    assert network.bind(bucket).kernel == network.kernel


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_with_the_bits_of_torch_it_is_used(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    network = plain(kind)
    by_hand_becomes(monkeypatch, like_torch)
    certify(network, CANDIDATES)
    assert network.kernel == "fused"
    assert network.bind(4).kernel == "fused"


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_where_only_the_biases_make_a_difference_they_stay_in_the_products(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    network = plain(kind)

    def other(step: RecurrentStep) -> None:
        like_torch(step)
        if step.kernel == "fused":
            nudge(step.y[-1, -1:])

    by_hand_becomes(monkeypatch, other)
    network.select_step(CANDIDATES, PROBES)
    assert network.kernel == "addmm"


@pytest.mark.parametrize(("kind", "bucket"), SPOILED)
def test_with_bits_that_seldom_differ_it_is_left_out(monkeypatch: pytest.MonkeyPatch, kind: str, bucket: int) -> None:
    """The first batches of a bucket do not show it."""
    network = plain(kind)
    values = 0

    def other(step: RecurrentStep) -> None:
        nonlocal values
        like_torch(step)
        if len(step.y) == bucket:
            values += step.y.numel()
            if values > 2000:
                nudge(step.y[-1, -1:])

    by_hand_becomes(monkeypatch, other)
    network.select_step(CANDIDATES, PROBES)
    assert network.kernel not in BY_HAND


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("hidden_size", [1, 8, 15, 17, 24, 31, 33])
def test_in_widths_that_do_not_fill_vectors_it_is_left_out_untried(
    monkeypatch: pytest.MonkeyPatch, hidden_size: int, kind: str
) -> None:
    def tried(step: RecurrentStep) -> None:
        raise AssertionError

    by_hand_becomes(monkeypatch, tried)
    network = of_size(kind, hidden_size)
    network.select_step(CANDIDATES, PROBES)
    assert network.kernel == "torch"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden_size", [16, 32, 48, 64])
def test_in_other_widths_it_is_used_only_where_no_row_of_many_others_differs(hidden_size: int, kind: str) -> None:
    network = of_size(kind, hidden_size)
    network.select_step(CANDIDATES, PROBES)
    if network.kernel not in BY_HAND:
        return
    random = np.random.default_rng(7)
    x = random.standard_normal((200, 64, 5)).astype(np.float32)
    rows = random_rows(network.state, 64, random)
    answers = []
    kernels: tuple[Kernel, ...] = ("native" if kind == "lstm" else "torch", network.kernel)
    for network.kernel in kernels:
        step = network.bind(64)
        answers.append(b"".join(step_rows(step, network.state, frame, rows, hidden_size)[0].tobytes() for frame in x))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("spoiled", "bucket", "expected"),
    [
        ((), 64, "fused"),
        (("fused",), 64, "addmm"),
        (("fused", "addmm"), 64, "torch"),
        (("fused", "addmm", "native"), 64, "torch"),
        (("fused", "addmm"), 24, "native"),
    ],
)
def test_an_lstm_has_the_bits_of_onednn_where_those_without_it_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, spoiled: tuple[str, ...], bucket: int, expected: str
) -> None:
    """What steps give here depends on the batch size only where they are spoiled."""

    def run(step: RecurrentStep) -> None:
        for leaf in step.leaves.values():
            leaf.copy_(step.x[:, :1])
        if len(step.y) == bucket and step.kernel in spoiled:
            nudge(step.y[0, :1])

    monkeypatch.setattr(RecurrentStep, "run", run)
    network = plain("lstm")
    network.select_step(CANDIDATES, 100)
    assert network.kernel == expected
    network.select_step((24,), 100)
    assert (network.kernel == "torch") == (expected == "torch"), "whose bits they are does not depend on the sizes"


class _Switch(TorchFunctionMode):
    """Notes whether oneDNN is on whenever a function of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[bool]()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(bool(torch.backends.mkldnn.enabled))
        return function(*args, **(kwargs or {}))


def test_an_lstm_never_turns_onednn_off_for_models_in_other_threads() -> None:
    fields = {"kind": "lstm", "features": 5, "lstm": {"hidden_size": 32}, "after": [{"size": 3}]}
    network = RecurrentNetwork(make_model(parse_description(fields), "random", name="n", seed=1), CPU)
    x, rows = np.ones((3, 32, 5), np.float32), network.state.initial(32)
    network.kernel = "native"
    with _Switch() as switch:
        network.sequence(x, rows)
        network.select_step((32, 64), 100)
    assert switch.seen == {True}


def test_the_bits_of_an_lstm_do_not_depend_on_the_grad_mode_of_the_caller() -> None:
    network = plain("lstm")
    random = np.random.default_rng(3)
    x, rows = random.standard_normal((20, 8, 5)).astype(np.float32), random_rows(network.state, 8, random)
    with torch.inference_mode():
        expected, _ = network.sequence(x, rows)
    with torch.enable_grad():
        assert network.sequence(x, rows)[0].tobytes() == expected.tobytes()
