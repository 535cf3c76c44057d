from __future__ import annotations

import math
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from instep.demo.train import Utterances, accuracy, load_utterances, main, train
from instep.models.folder import load_model
from instep.models.handover.save import save_model
from instep.models.registry import build
from tests.support.models import in_one_call

DEMO = Path(str(files("instep.demo")))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def few(utterances: Utterances, count: int) -> Utterances:
    """The first utterances of each speaker, few in all."""
    chosen = np.concatenate([np.flatnonzero(utterances.speakers == speaker)[:count] for speaker in range(9)])
    return Utterances(tuple(utterances.frames[index] for index in chosen), utterances.speakers[chosen])


def test_the_recordings_are_all_there() -> None:
    for split, count, frames in (("train", 270, 4274), ("test", 370, 5687)):
        utterances = load_utterances("train" if split == "train" else "test")
        assert len(utterances.frames) == len(utterances.speakers) == count
        assert sum(map(len, utterances.frames)) == frames
        assert {each.shape[1] for each in utterances.frames} == {12}
        assert 7 <= min(map(len, utterances.frames)) <= max(map(len, utterances.frames)) <= 29
        assert set(utterances.speakers.tolist()) == set(range(9))
    assert "CC BY 4.0" in (DEMO / "data" / "README.md").read_text()


def test_the_shipped_model_reaches_its_accuracy() -> None:
    model = load_model(DEMO / "model")
    assert (model.name, model.description.features, model.description.outputs) == ("speakers", 12, 9)
    reached = accuracy(model, load_utterances("test"))
    assert round(370 * reached.last_frame) == 358
    assert round(5687 * reached.all_frames) == 5395


def test_accuracy_is_that_of_torch_modules_one_utterance_at_a_time() -> None:
    model = load_model(DEMO / "model")
    gru, head = nn.GRU(12, 64), nn.Linear(64, 9)
    gru.load_state_dict({name[4:]: tensor for name, tensor in model.weights.items() if name.startswith("gru.")})
    head.load_state_dict({name[8:]: tensor for name, tensor in model.weights.items() if name.startswith("after.")})
    test = few(load_utterances("test"), 5)
    last, every = [], []
    for frames, speaker in zip(test.frames, test.speakers, strict=True):
        right = head(gru(torch.from_numpy(frames)[:, None])[0])[:, 0].argmax(1) == int(speaker)
        last.append(bool(right[-1]))
        every += right.tolist()
    reached = accuracy(model, test)
    assert reached.last_frame == pytest.approx(sum(last) / len(last))
    assert reached.all_frames == pytest.approx(sum(every) / len(every))
    assert 0 < reached.all_frames < 1


def test_the_command_trains_a_model_as_good_as_the_shipped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    model = load_model(tmp_path / "m")
    reached = accuracy(model, load_utterances("test"))
    assert reached.last_frame > 0.94
    assert reached.all_frames > 0.92
    assert f"test accuracy {reached.last_frame:.4f} on the last frame" in said
    assert f"{reached.all_frames:.4f} averaged over all frames" in said
    assert "epoch 10 of 60" in said
    assert model.description == load_model(DEMO / "model").description


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file" / "m")], epochs=1) == 1
    assert "cannot write the model folder" in capsys.readouterr().err


def test_training_is_repeatable_learns_and_leaves_randomness_alone() -> None:
    utterances = few(load_utterances("train"), 6)
    losses: list[tuple[int, float]] = []
    torch.manual_seed(1)
    gru, head = train(utterances, seed=3, epochs=3, progress=lambda epoch, loss: losses.append((epoch, loss)))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    again, again_head = train(utterances, seed=3, epochs=3)
    other, _ = train(utterances, seed=4, epochs=3)
    assert torch.equal(gru.get_parameter("weight_hh_l0"), again.get_parameter("weight_hh_l0"))
    assert torch.equal(head.weight, again_head.weight)
    assert not torch.equal(gru.get_parameter("weight_hh_l0"), other.get_parameter("weight_hh_l0"))
    assert [epoch for epoch, _ in losses] == [1, 2, 3]
    assert all(earlier > later for (_, earlier), (_, later) in pairwise(losses))


def test_another_gain_and_offset_of_the_frames_is_folded_away(tmp_path: Path) -> None:
    """Standardised, both are one data set; so the models decide alike, each on frames as recorded."""
    utterances = few(load_utterances("train"), 6)
    gain = np.linspace(0.5, 200, 12, dtype=np.float32)
    louder = replace(utterances, frames=tuple(frames * gain + 7 for frames in utterances.frames))
    reached = []
    for data in (utterances, louder):
        gru, head = train(data, epochs=20)
        reached.append(accuracy(save_model(tmp_path / "m", gru, after=[(head, "none")], overwrite=True), data))
    assert reached[0].all_frames > 0.5
    assert reached[1].all_frames == pytest.approx(reached[0].all_frames, abs=0.02)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_seeds_model_gives_the_numbers_computed_by_hand() -> None:
    """Weights 0.5, biases 0, equal inputs: all four units stay equal, and each frame is one line of arithmetic."""
    model = load_model(DEMO / "seed_model")
    assert (model.name, model.description.features, model.description.outputs) == ("seed", 3, 4)
    assert {name: set(tensor.flatten().tolist()) for name, tensor in model.weights.items()} == {
        "gru.weight_ih_l0": {0.5},
        "gru.weight_hh_l0": {0.5},
        "gru.bias_ih_l0": {0.0},
        "gru.bias_hh_l0": {0.0},
    }
    streams = [[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]]
    x = torch.zeros(5, 4, 3)
    expected = torch.zeros(5, 4, 4, dtype=torch.float64)
    for row, stream in enumerate(streams):
        h = 0.0
        for timestep, value in enumerate(stream):
            x[timestep, row] = value
            from_x, from_h = 3 * 0.5 * value, 4 * 0.5 * h
            r = z = sigmoid(from_x + from_h)
            n = math.tanh(from_x + r * from_h)
            h = (1 - z) * n + z * h
            expected[timestep, row] = h
    y, final = in_one_call(build(model, torch.device("cpu")), x.numpy(), np.zeros((1, 4, 4), np.float32))
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(final[0], expected[-1].numpy(), rtol=0, atol=1e-6)
    assert expected[0, 0, 0] == pytest.approx(0.165122, abs=1e-6)  # 0.182426 * tanh(1.5)
    assert expected[0, 1, 0] == pytest.approx(0.000553, abs=1e-6)  # 0.000553 * tanh(7.5)
