"""The command `instep model shadow`."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from instep.config import Config
from instep.interrupts import Stopped
from instep.models.folder import load_version
from instep.models.numerics import prepare
from instep.models.registry import build
from instep.recording.reader import RecordingReader
from instep.runtime.stepper import Stepper
from instep.shadow.shadow import Shadow

COMPARED: Final = 0
DIFFERS: Final = 1
NOT_COMPARED: Final = 2

WARM_UP: Final = 256
MOST_STREAMS: Final = 1024
MOST_LISTED: Final = 1024
_PAUSE_S: Final = 0.25
"""Between two readings of the recording."""


@dataclass(frozen=True, slots=True)
class Shadowing:
    """The arguments of the command; see `instep model shadow --help`."""

    recording: Path
    folder: Path
    share: float
    seconds: float | None
    warm_up: int | None
    tolerance: float | None
    json: bool


def run(asked: Shadowing, console: Console) -> int:
    """Follow a recording with a candidate until the time is over, it ends, or a signal comes; print how it differs.

    Returns:
        The exit status: 0 after a comparison, 1 when a value differed by more than the tolerance, 2 when nothing was
        compared.

    Raises:
        ModelError: when the candidate cannot be loaded, or frames or outputs are of another size.
        RecordingError: when the recording cannot be read.
    """
    shadow = make_shadow(asked)
    with suppress(Stopped):  # it ends then, and reports
        _follow(shadow, asked.seconds)
    report = shadow.report(str(asked.folder))
    if not report.frames and shadow.unavailable is not None:
        raise shadow.unavailable
    if asked.json:
        console.file.write(dumps(report.as_json(), allow_nan=False) + "\n")
    else:
        report.render(console)
    if not report.frames:
        return NOT_COMPARED
    return DIFFERS if asked.tolerance is not None and report.largest > asked.tolerance else COMPARED


def _follow(shadow: Shadow, seconds: float | None) -> None:
    shadow.follow()  # what came before does not count as being late
    until = float("inf") if seconds is None else time.monotonic() + seconds
    while not shadow.is_finished and (now := time.monotonic()) < until:
        time.sleep(min(_PAUSE_S, until - now))
        shadow.keep_up()


def make_shadow(asked: Shadowing, most_streams: int = MOST_STREAMS, most_listed: int = MOST_LISTED) -> Shadow:
    """A candidate that has not followed anything yet.

    Args:
        asked: the recording, the candidate's folder, and what is to be compared.
        most_streams: followed at the same time.
        most_listed: streams in a report.

    Raises:
        ModelError: when the candidate cannot be loaded, or frames or outputs are of another size.
        RecordingError: when the recording cannot be read.
    """
    engine = Config().engine
    prepare()
    with RecordingReader(asked.recording) as recording:
        header = recording.header
    model = load_version(asked.folder, header.features, header.outputs, f"{asked.recording} is of a model")
    network = build(model, torch.device("cpu"))
    warm_up = asked.warm_up
    if warm_up is None and network.state != header.state_spec:
        warm_up = WARM_UP
    stepper = Stepper(network, engine.max_batch_size, most_streams, torch.device("cpu"))
    return Shadow(asked.recording, stepper, warm_up, asked.share, most_streams, most_listed)
