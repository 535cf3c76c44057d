"""Finding the model that a recording was made with."""

from __future__ import annotations

from pathlib import Path

from instep.models.base import Description
from instep.models.errors import ModelError
from instep.models.folder import load_model, model_from_parts
from instep.models.model import Model
from instep.models.registry import parse_description
from instep.recording.schema import RecordingHeader
from instep.verify.report import CannotVerify


def recorded_model(header: RecordingHeader, folder: Path | None) -> Model:
    """Load the recorded model, by its fingerprint, from `folder` or from where the recording says.

    Where the engine took a weights file and a description from its config, the recording names the file and holds the
    description.

    Raises:
        CannotVerify: when the model is missing, cannot be read, or is another one.
    """
    description = _recorded_description(header)
    place = folder or Path(header.model_folder)
    if folder is None and (not header.model_folder or not place.exists()):
        raise CannotVerify(
            f"the recording was made with the model {header.model_name!r}, which is no longer there "
            f"({header.model_folder or 'its folder is not recorded'}); name its folder with --model"
        )
    try:
        model = model_from_parts(description, place, header.model_name) if place.is_file() else load_model(place)
    except ModelError as error:
        raise CannotVerify(f"the model cannot be loaded: {error}") from None
    if model.fingerprint != header.model_fingerprint or model.description != description:
        raise CannotVerify(
            f"the model in {place} is not the one the recording was made with (fingerprint {model.fingerprint[:12]}… "
            f"instead of {header.model_fingerprint[:12]}…); name the folder of that one with --model"
        )
    return model


def _recorded_description(header: RecordingHeader) -> Description:
    try:
        return parse_description(header.description)
    except ModelError as error:
        raise CannotVerify(
            f"the recording's description of its network is not valid, so the file is damaged: {error}"
        ) from None
