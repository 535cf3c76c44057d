"""Verifying recordings in tests."""

from __future__ import annotations

from pathlib import Path

from instep.models.folder import load_model
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from instep.verify import verifier
from instep.verify.checkers import CHECK_LIMITS, CheckLimits
from instep.verify.report import Report
from tests.support.forger import Forger
from tests.support.recordings import Recorded


def ignore_progress(stage: verifier.Stage, share: float) -> None:
    assert stage in verifier.STAGES
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


def forge(recorded: Recorded) -> Forger:
    """Changes a copy of a recording, with the right CRCs."""
    return Forger(recorded.path, recorded.path.with_name("forged.rec"))


def verdicts(report: Report) -> list[str]:
    return [stream.verdict for stream in report.streams]
