"""Recordings whose commits wait, so that a test can do things before anything is durable."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from instep.recording.writer import RecordingWriter


@contextlib.asynccontextmanager
async def held_commits() -> AsyncIterator[threading.Event]:
    """Commits wait while this event is cleared, and no longer than the block runs."""
    may_commit, commit = threading.Event(), RecordingWriter.commit
    may_commit.set()

    def waiting_commit(self: RecordingWriter) -> None:
        may_commit.wait()
        commit(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordingWriter, "commit", waiting_commit)
        try:
            yield may_commit
        finally:
            may_commit.set()
