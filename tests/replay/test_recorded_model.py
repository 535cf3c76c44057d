"""The model that a recording is replayed with, and whether its bits must come out equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from instep.models.portable.form import ARITHMETIC
from instep.recording.schema import RecordingHeader
from instep.replay.recorded_model import recorded_model, why_not_bits
from instep.replay.report import CannotVerify
from tests.support.recordings import Recorded, gru_description, make_gru, make_header, record_gru


def test_bits_are_required_of_every_engine_that_computed_in_the_portable_arithmetic() -> None:
    header = make_header(gru_description(make_gru()), arithmetic=ARITHMETIC)
    assert why_not_bits([header, header]) == ()
    others = [replace(header, arithmetic=f"torch on cuda:{index}") for index in (1, 0, 1)]
    assert why_not_bits([header, *others]) == (
        "the engine computed with torch on cuda:1, which promises no bits",
        "the engine computed with torch on cuda:0, which promises no bits",
    )


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


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("", "its folder is not recorded"),
        ("/nowhere/model", "/nowhere/model"),
        ("a" * 300, "aaa"),
        ("a\0b", "--folder"),
    ],
)
def test_a_model_that_is_not_there(recorded: Recorded, place: str, sentence: str) -> None:
    with pytest.raises(CannotVerify) as raised:
        recorded_model(changed(recorded.header, place), None)
    assert sentence in str(raised.value)
    assert "--folder" in str(raised.value)


def test_a_description_that_is_none(recorded: Recorded) -> None:
    description = {**recorded.header.description, "gru": {"hidden_size": 4, "num_layers": 1, "surprise": 1}}
    with pytest.raises(CannotVerify):
        recorded_model(replace(recorded.header, description=description), recorded.folder)
