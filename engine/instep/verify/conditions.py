"""Under which conditions a recording is replayed here, and whether its bits must come out equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from instep.models.certify import candidate_buckets, certify
from instep.models.gru.network import GruNetwork
from instep.models.numerics import numerics, prepare
from instep.recording.engines import differing
from instep.recording.schema import RecordingHeader

MOST_ROWS: Final = 256
"""Streams replayed side by side."""
MOST_THREADS: Final = 256


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was found out, or is presumed, before the replay."""

    buckets: tuple[int, ...]
    """Batch sizes to replay in, ascending."""
    step_notes: tuple[str, ...]
    """Why stepping need not give the recorded bits; empty where it must."""
    whole_notes: tuple[str, ...]
    """Why the whole sequence in one call need not, on top of `step_notes`."""
    is_presumed: bool = False
    """Whether that bits are the same is only to be expected: this machine was not certified."""

    @property
    def step_bits(self) -> bool:
        """Whether stepping must give the recorded bits."""
        return not self.step_notes

    @property
    def whole_bits(self) -> bool:
        """Whether the whole sequence in one call must give the recorded bits."""
        return not self.step_notes and not self.whole_notes


def presume_conditions(headers: Sequence[RecordingHeader], network: GruNetwork) -> Conditions:
    """Certify this machine only if it is not such a one as recorded, in exact steps.

    On one that is, bits that come out as recorded need no certificate, and those that do not are no proof without one.
    """
    if _differences(headers, network):
        return find_conditions(headers, network)
    network.select_quickest()
    return Conditions(_buckets(headers, network), (), (), is_presumed=True)


def find_conditions(headers: Sequence[RecordingHeader], network: GruNetwork) -> Conditions:
    """Certify this machine and compare it with those that recorded, one after another."""
    certification = certify(network, _buckets(headers, network))
    step_notes = _differences(headers, network)
    if certification.exactness != "exact":
        step_notes.append("on this machine, a frame's bits depend on the batch size")
    whole_notes = []
    if not certification.whole_sequence:
        whole_notes.append("on this machine, a whole sequence in one call has other bits than stepping it")
    return Conditions(certification.buckets, tuple(dict.fromkeys(step_notes)), tuple(whole_notes))


def _buckets(headers: Sequence[RecordingHeader], network: GruNetwork) -> tuple[int, ...]:
    """Those of the recording, where they are of use; ascending."""
    recorded = [bucket for header in headers for bucket in header.buckets if bucket <= MOST_ROWS]
    fitting = all(bucket > 0 and bucket % network.row_multiple == 0 for bucket in recorded)
    return tuple(sorted(set(recorded))) if recorded and fitting else candidate_buckets(network, MOST_ROWS)


def _differences(headers: Sequence[RecordingHeader], network: GruNetwork) -> list[str]:
    """Why what was recorded need not have the bits that are computed here, whatever this machine can do."""
    notes = []
    for header in headers:
        if header.exactness != "exact":
            notes.append(f"the engine ran with exactness {header.exactness}, which promises no bits")
        if differences := differing(header.numerics, numerics(network.device)):
            notes.append(f"this machine computes otherwise than the one that recorded: {'; '.join(differences)}")
    return notes


def device_for(header: RecordingHeader) -> torch.device:
    """The device that recorded where there is one of that name here, else the CPU."""
    wanted = header.numerics.get("device", "cpu")
    here = ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
    return torch.device(wanted if torch.cuda.is_available() and wanted in here else "cpu")


@contextmanager
def recorded_threads(header: RecordingHeader) -> Iterator[None]:
    """As many threads as the engine had, since bits can depend on it; the former number afterwards."""
    before = torch.get_num_threads()
    wanted = header.numerics.get("threads", "")
    prepare(int(wanted) if wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) <= MOST_THREADS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
