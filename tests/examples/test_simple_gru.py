"""The first example: the streamed outputs and states are torch's, to rounding, and the recording is exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from examples import simple_gru
from examples.__main__ import main
from examples.simple_gru import H_0, WEIGHTS, X, recording_of, stream
from instep.replay.command import run as verify
from tests.support.threaded import ThreadedServer

PAGE = (Path(__file__).parents[2] / "examples" / "README.md").read_text()


@pytest.fixture(autouse=True)
def served_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.example.ChildServer", ThreadedServer)


@pytest.mark.parametrize("title", WEIGHTS)
def test_one_timestep_at_a_time_gives_the_outputs_of_the_whole_sequence(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gru = WEIGHTS[title]()
    streamed = stream(gru, tmp_path / title, recording_of(tmp_path, title))
    assert streamed.shape == (2, 5 + 1, 4)
    with torch.no_grad():
        output, state = gru(X, H_0)
    np.testing.assert_allclose(streamed[:, :-1], output.numpy(), rtol=0, atol=5e-6)
    np.testing.assert_allclose(streamed[:, -1], state[0].numpy(), rtol=0, atol=5e-6)
    weights = {float(value) for values in gru.state_dict().values() for value in values.flatten()}
    assert (weights == {0.0, 0.5}) == (title == "constant")

    assert verify([recording_of(tmp_path, title)], None, [], Console(), json=True) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "exact"


def test_the_command_shows_both_side_by_side_as_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["examples", "simple-gru"])
    assert main() == 0
    out = capsys.readouterr().out
    shown = PAGE.split("```text\n", 1)[1].split("…", 1)[0]
    assert out.startswith(shown)
    assert out.count("final state") == len(simple_gru.WEIGHTS)
