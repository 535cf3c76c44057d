"""Conditions of a replay: the model, the device, and whether bits must come out equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from instep.models.base import Description, RecurrentModel
from instep.models.certify import Certification, candidate_buckets, certify
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.model import Model
from instep.models.numerics import numerics, prepare
from instep.models.registry import build, parse_description
from instep.recording.records import differing
from instep.recording.schema import RecordingHeader
from instep.verify.report import CannotVerify

MOST_ROWS: Final = 256
"""Streams replayed side by side, at most."""
MOST_THREADS: Final = 256


@dataclass(frozen=True, slots=True)
class Conditions:
    """The facts that were found before the replay."""

    buckets: tuple[int, ...]
    """Batch sizes to replay in, ascending."""
    step_notes: tuple[str, ...]
    """Why stepping need not give the recorded bits; empty where it must."""
    whole_notes: tuple[str, ...]
    """Why the whole sequence in one call need not, on top of `step_notes`."""
    has_whole: bool = True
    """Whether the network has a call for whole sequences."""

    @property
    def step_bits(self) -> bool:
        """Whether stepping must give the recorded bits."""
        return not self.step_notes

    @property
    def whole_bits(self) -> bool:
        """Whether the whole sequence in one call must give the recorded bits."""
        return not self.step_notes and not self.whole_notes


def find_conditions(
    headers: Sequence[RecordingHeader],
    network: RecurrentModel,
    certify: Callable[[RecurrentModel, Sequence[int]], Certification] = certify,
) -> Conditions:
    """Certify this machine, and compare it with each engine that wrote the recording.

    The network steps from here on in the way that was certified.

    Raises:
        CannotVerify: when it cannot be stepped with the rows that certification tries.
    """
    recorded = _recorded_buckets(headers, network)
    try:
        certification = certify(network, recorded or candidate_buckets(network, MOST_ROWS))
    except ModelError as error:
        raise CannotVerify(f"the model cannot be certified here: {error}") from None
    step_notes = _differences(headers, network)
    if certification.exactness != "exact":
        step_notes.append("on this machine, a frame's bits depend on the batch size")
    elif uncertified := sorted({*recorded} - {*certification.buckets}):
        sizes = ", ".join(map(str, uncertified))
        step_notes.append(f"on this machine, a frame has other bits in batches of {sizes}, which the engine used")
    whole_notes, has_whole = [], _has_whole(network)
    if has_whole and not certification.whole_sequence:
        whole_notes.append("on this machine, a whole sequence in one call has other bits than stepping it")
    return Conditions(certification.buckets, tuple(dict.fromkeys(step_notes)), tuple(whole_notes), has_whole)


def _has_whole(network: RecurrentModel) -> bool:
    rows = network.row_multiple
    frames = np.zeros((1, rows, network.description.features), np.float32)
    return network.sequence(frames, network.state.initial(rows)) is not None


def _recorded_buckets(headers: Sequence[RecordingHeader], network: RecurrentModel) -> tuple[int, ...]:
    """The buckets of the recording, ascending; none where this network cannot run in all of them."""
    recorded = {bucket for header in headers for bucket in header.buckets if bucket <= MOST_ROWS}
    fitting = all(bucket > 0 and bucket % network.row_multiple == 0 for bucket in recorded)
    return tuple(sorted(recorded)) if fitting else ()


def _differences(headers: Sequence[RecordingHeader], network: RecurrentModel) -> list[str]:
    """Reasons why the recorded bits may differ from those computed here even if this machine certifies exactness."""
    notes = []
    for header in headers:
        if header.exactness != "exact":
            notes.append(f"the engine ran with exactness {header.exactness}, which promises no bits")
        if differences := differing(header.numerics, numerics(network.device, network.kernel)):
            notes.append(f"this machine differs from the one that recorded: {'; '.join(differences)}")
    return notes


def device_for(header: RecordingHeader) -> torch.device:
    """The device that the recording names if this machine has it, else the CPU."""
    wanted = header.numerics.get("device", "cpu")
    here = ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
    return torch.device(wanted if torch.cuda.is_available() and wanted in here else "cpu")


@contextmanager
def recorded_threads(header: RecordingHeader) -> Iterator[None]:
    """Give torch the number of threads that the engine had, since bits can depend on it, and restore it afterwards."""
    before = torch.get_num_threads()
    wanted = header.numerics.get("threads", "")
    prepare(int(wanted) if wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) <= MOST_THREADS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded_model(header: RecordingHeader, folder: Path | None) -> Model:
    """Load the recorded model, by its fingerprint, from `folder` or from where the recording says.

    Raises:
        CannotVerify: when the model is missing, cannot be read, or is another one.
    """
    description = _recorded_description(header)
    place = folder or Path(header.model_folder)
    if folder is None and (not header.model_folder or not os.path.exists(place)):  # Path's raises if it is too long
        raise CannotVerify(
            f"the recording was made with the model {header.model_name!r}, which is no longer there "
            f"({header.model_folder or 'its folder is not recorded'}); name its folder with --model"
        )
    try:
        model = load_model(place)
    except ModelError as error:
        raise CannotVerify(f"the model cannot be loaded: {error}") from None
    if model.fingerprint != header.model_fingerprint or model.description != description:
        raise CannotVerify(
            f"the model in {place} is not the one the recording was made with (fingerprint {model.fingerprint[:12]}… "
            f"instead of {header.model_fingerprint[:12]}…); name the folder of that one with --model"
        )
    return model


def recorded_network(model: Model, header: RecordingHeader) -> RecurrentModel:
    """The network of a recorded model, on the device that the recording names if this machine has it.

    Raises:
        CannotVerify: when it cannot be computed here.
    """
    try:
        return build(model, device_for(header))
    except ModelError as error:
        raise CannotVerify(f"the model cannot be computed here: {error}") from None


def _recorded_description(header: RecordingHeader) -> Description:
    try:
        return parse_description(header.description)
    except ModelError as error:
        raise CannotVerify(
            f"the recording's description of its network is not valid, so the file is damaged: {error}"
        ) from None
