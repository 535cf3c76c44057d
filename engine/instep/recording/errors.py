"""What can be wrong with a recording."""

from __future__ import annotations


class RecordingError(Exception):
    """A recording cannot be written or read; the message is a sentence saying why and what to do."""


class DamagedRecording(RecordingError):
    """A recording holds something else than what was written; the message says where."""
