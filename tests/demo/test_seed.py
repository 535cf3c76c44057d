from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from instep.demo import seed
from instep.demo.child_server import ChildFailed
from instep.demo.seed import ThreeOutputs, verdict
from tests.support.served import WarmServer

ROWS = ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
"""Each row of the batch by timestep; all three features are the same."""


def by_hand(values: Sequence[float]) -> list[float]:
    """The GRU's equations for weights 0.5 and biases 0, where all four hidden values are one and the same number."""
    h, outputs = 0.0, []
    for value in values:
        from_input, from_state = 3 * 0.5 * value, 4 * 0.5 * h
        reset = update = 1 / (1 + math.exp(-(from_input + from_state)))
        new = math.tanh(from_input + reset * from_state)
        h = (1 - update) * new + update * h
        outputs.append(h)
    return outputs


@pytest.fixture(scope="module")
def shown() -> tuple[int, str]:
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seed, "ChildServer", WarmServer)
        status = seed.run(Console(file=file, width=200))
    return status, file.getvalue()


def test_the_three_tables_are_what_comes_out_by_hand(shown: tuple[int, str]) -> None:
    # In the order in which all three tables print: timestep, row, hidden value.
    expected = [
        f"{value:.4f}" for values in zip(*map(by_hand, ROWS), strict=True) for value in values for _ in range(4)
    ]
    _, whole, stepped, served = re.split(r"\n(?:The whole|One timestep|Served over)", shown[1])
    for table in (whole, stepped, served):
        assert re.findall(r"-?\d\.\d{4}", table) == expected
    assert (whole.count("tensor("), stepped.count("tensor("), served.count("tensor(")) == (1, 5, 5)


def test_they_are_equal_bit_for_bit(shown: tuple[int, str]) -> None:
    status, text = shown
    *_, heading, printed, own, torchs = text.splitlines()
    assert heading == "whole sequence, one timestep at a time, served:"
    assert printed == "equal to 4 decimals, as printed;"
    assert own == "in portable-1: equal bit for bit;"
    assert re.fullmatch(r"torch's nn.GRU is up to \d\.\de[+-]\d\d away from it", torchs)
    assert status == 0


def test_the_network_is_the_experiments(shown: tuple[int, str]) -> None:
    assert shown[1].startswith(
        "SimpleGRU(\n  (rnn): GRU(3, 4, batch_first=True)\n)\n"
        "all weights 0.5, all biases 0\nInput data shape torch.Size([2, 5, 3])\n"
    )


EQUAL = ThreeOutputs(torch.tensor([0.25]), torch.tensor([0.25]), torch.tensor([0.25]))
LAST_BIT = ThreeOutputs(torch.tensor([0.25]), torch.tensor([0.25]).nextafter(torch.tensor(1.0)), torch.tensor([0.25]))
FAR = ThreeOutputs(torch.tensor([0.25]), torch.tensor([0.25]), torch.tensor([0.2502]))


class TestVerdict:
    def test_torch_may_differ_in_the_last_bit(self) -> None:
        equal, sentence = verdict(LAST_BIT, EQUAL)
        assert equal
        assert sentence == (
            "equal to 4 decimals, as printed;\nin portable-1: equal bit for bit;\n"
            "torch's nn.GRU is up to 3.0e-08 away from it"
        )

    def test_portable_1_may_not(self) -> None:
        equal, sentence = verdict(EQUAL, LAST_BIT)
        assert not equal
        assert "in portable-1: NOT equal bit for bit, up to 3.0e-08 apart" in sentence

    def test_what_is_printed_may_not_differ(self) -> None:
        equal, sentence = verdict(FAR, EQUAL)
        assert not equal
        assert sentence.startswith("NOT equal to 4 decimals")


class NoServer:
    def __init__(self, model: Path, arguments: Sequence[str] = ()) -> None:
        assert (model / "weights.safetensors").exists()

    def __enter__(self) -> NoServer:
        raise ChildFailed("the server did not start: for this reason")

    def __exit__(self, *error: object) -> None:
        pass


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "ChildServer", NoServer)
    file = io.StringIO()
    assert seed.run(Console(file=file)) == 1
    assert file.getvalue().endswith("the server did not start: for this reason\n")
