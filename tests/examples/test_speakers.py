"""The trainer of the demo's model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.speakers import TRAIN, accuracy, main, train
from instep.demo import MODEL_FOLDER
from instep.demo.producers import Utterances, load_utterances
from instep.models.folder import load_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_recordings_are_all_there() -> None:
    for utterances, count, frames in ((load_utterances(TRAIN), 270, 4274), (load_utterances(), 370, 5687)):
        assert len(utterances.frames) == len(utterances.speakers) == count
        assert sum(map(len, utterances.frames)) == frames
        assert {each.shape[1] for each in utterances.frames} == {12}
        assert set(utterances.speakers.tolist()) == set(range(9))


def test_the_shipped_model_reaches_its_accuracy() -> None:
    last_frame, all_frames = accuracy(load_model(MODEL_FOLDER), load_utterances())
    assert (round(370 * last_frame), round(5687 * all_frames)) == (358, 5395)


@pytest.mark.long
def test_the_command_trains_a_model_as_good_as_the_shipped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "m")]) == 0
    model = load_model(tmp_path / "m")
    last_frame, all_frames = accuracy(model, load_utterances())
    assert last_frame > 0.94
    assert all_frames > 0.92
    assert f"test accuracy {last_frame:.4f} on the last frame" in capsys.readouterr().out
    assert model.description == load_model(MODEL_FOLDER).description


def test_training_is_repeatable_and_learns() -> None:
    every = load_utterances(TRAIN)
    chosen = np.arange(0, 270, 5)
    utterances = Utterances(tuple(every.frames[index] for index in chosen), every.speakers[chosen])
    losses: list[float] = []
    gru, head = train(utterances, seed=3, epochs=3, progress=lambda _, loss: losses.append(loss))
    again, again_head = train(utterances, seed=3, epochs=3)
    assert torch.equal(gru.get_parameter("weight_hh_l0"), again.get_parameter("weight_hh_l0"))
    assert torch.equal(head.weight, again_head.weight)
    assert all(earlier > later for earlier, later in pairwise(losses))
