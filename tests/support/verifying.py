"""Verifying recordings in tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from instep.core.typing import F32, I64, U8
from instep.models.folder import load_model
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from instep.replay import verifier
from instep.replay.checkers import CHECK_LIMITS, CheckLimits
from instep.replay.replay import StateTable
from instep.replay.report import Report
from tests.support.forger import Forger
from tests.support.recordings import Recorded


def ignore_progress(share: float) -> None:
    assert 0 <= share <= 1


def verify(
    recorded: Recorded,
    *wanted: str,
    path: Path | None = None,
    model: Model | None = None,
    on_progress: verifier.Progress = ignore_progress,
    limits: CheckLimits = CHECK_LIMITS,
) -> Report:
    """Verify a recording, or another file made with the same model."""
    with RecordingReader(path or recorded.path) as reader:
        return verifier.verify(reader, model or load_model(recorded.folder), wanted, on_progress, limits)


def stepping(patch: pytest.MonkeyPatch, change: Callable[[F32, U8], tuple[F32, U8]]) -> None:
    """From now on, the verifier's compiled step gives other outputs, [R, outputs], and states, [R, row_bytes]."""
    right = StateTable.step

    def step(table: StateTable, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        right(table, slots, rows, inputs, outputs)
        outputs[rows], states = change(outputs[rows], table.read(slots))
        table.load(slots, states)

    patch.setattr(StateTable, "step", step)


def forge(recorded: Recorded) -> Forger:
    """Changes a copy of a recording, with the right CRCs."""
    return Forger(recorded.path, recorded.path.with_name("forged.rec"))


def verdicts(report: Report) -> list[str]:
    return [stream.verdict for stream in report.streams]
