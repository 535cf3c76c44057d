"""What can be wrong with a recording."""

from __future__ import annotations


class RecordingError(Exception):
    """A recording cannot be written or read; the message is a sentence saying why and what to do."""


class NoSuchStream(RecordingError):
    """A recording has no stream of a name or number; the message says which there are."""


class DamagedRecording(RecordingError):
    """A recording holds something else than what was written; the message says where."""
