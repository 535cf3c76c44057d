from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from instep.recording.schema import RecordingHeader
from instep.verify.model_source import recorded_model
from instep.verify.report import CannotVerify
from tests.support.recordings import Recorded, make_gru, make_header, record_gru


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path, make_gru(), [1])


def changed(header: RecordingHeader, model_folder: str) -> RecordingHeader:
    return make_header(
        header.description, model_folder=model_folder, model_fingerprint=header.model_fingerprint, model_name="m"
    )


def test_where_the_recording_says(recorded: Recorded) -> None:
    assert recorded_model(recorded.header, None).fingerprint == recorded.header.model_fingerprint


def test_where_the_user_says(recorded: Recorded, tmp_path: Path) -> None:
    moved = recorded.folder.rename(tmp_path / "moved")
    assert recorded_model(recorded.header, moved).fingerprint == recorded.header.model_fingerprint


def test_a_weights_file_with_the_recorded_description(recorded: Recorded) -> None:
    header = changed(recorded.header, str(recorded.folder / "weights.safetensors"))
    model = recorded_model(header, None)
    assert model.fingerprint == header.model_fingerprint
    assert model.name == "m"


@pytest.mark.parametrize(
    ("place", "sentence"), [("", "its folder is not recorded"), ("/nowhere/model", "/nowhere/model")]
)
def test_a_model_that_is_not_there(recorded: Recorded, place: str, sentence: str) -> None:
    with pytest.raises(CannotVerify, match="no longer there") as raised:
        recorded_model(changed(recorded.header, place), None)
    assert sentence in str(raised.value)
    assert "--model" in str(raised.value)


def test_a_folder_that_is_no_model(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(CannotVerify, match=r"the model cannot be loaded: cannot read .*model\.yaml"):
        recorded_model(recorded.header, tmp_path / "nothing")


def test_a_description_that_is_none(recorded: Recorded) -> None:
    description = {**recorded.header.description, "gru": {"hidden_size": 4, "num_layers": 1, "surprise": 1}}
    with pytest.raises(CannotVerify, match="description of its network is not valid, so the file is damaged"):
        recorded_model(replace(recorded.header, description=description), recorded.folder)
