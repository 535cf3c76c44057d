"""The model of a recording, and whether verification must find the recorded bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from instep.models.base import Description, RecurrentModel
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.model import Model
from instep.models.portable.form import ARITHMETIC
from instep.models.registry import build, parse_description
from instep.recording.schema import RecordingHeader
from instep.replay.report import CannotVerify


def why_not_bits(headers: Sequence[RecordingHeader]) -> tuple[str, ...]:
    """The reasons why bits need not be equal, from the engines that wrote a recording; empty if they must."""
    others = dict.fromkeys(header.arithmetic for header in headers if header.arithmetic != ARITHMETIC)
    return tuple(f"the engine computed with {arithmetic}, which promises no bits" for arithmetic in others)


def recorded_model(header: RecordingHeader, folder: Path | None) -> Model:
    """Load the recorded model from `folder` or the recorded path, and check its fingerprint.

    Raises:
        CannotVerify: when the model is missing, cannot be read, or is another one.
    """
    description = _recorded_description(header)
    place = folder or Path(header.model_folder)
    if folder is None and (not header.model_folder or not os.path.exists(place)):  # Path's raises if it is too long
        raise CannotVerify(
            f"the recording was made with the model {header.model_name!r}, which is no longer there "
            f"({header.model_folder or 'its folder is not recorded'}); name its folder with --folder"
        )
    try:
        model = load_model(place)
    except ModelError as error:
        raise CannotVerify(f"the model cannot be loaded: {error}") from None
    if model.fingerprint != header.model_fingerprint or model.description != description:
        raise CannotVerify(
            f"the model in {place} is not the one the recording was made with (fingerprint {model.fingerprint[:12]}… "
            f"instead of {header.model_fingerprint[:12]}…); name the folder of that one with --folder"
        )
    return model


def recorded_network(model: Model) -> RecurrentModel:
    """The network of a recorded model, compiled for this processor, whichever processor recorded it.

    Raises:
        CannotVerify: when it cannot be computed here.
    """
    try:
        return build(model, torch.device("cpu"))
    except ModelError as error:
        raise CannotVerify(f"the model cannot be computed here: {error}") from None


def _recorded_description(header: RecordingHeader) -> Description:
    try:
        return parse_description(header.description)
    except ModelError as error:
        raise CannotVerify(
            f"the recording's description of its network is not valid, so the file is damaged: {error}"
        ) from None
