"""A recording is checked while it grows: nothing that is right is ever called wrong, and what is wrong is found."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.models.registry import build
from instep.recording.reader import RecordingReader
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.replay.live_check import LiveCheck
from instep.replay.report import CannotVerify
from tests.support.growing import Story, look
from tests.support.recordings import NO_BITS
from tests.support.scribe import Scribe


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("retention", [KEEP_ALL, Retention(keep_bytes=100_000)], ids=["all", "trimmed"])
def test_what_is_right_is_verified_whatever_happens(tmp_path: Path, seed: int, retention: Retention) -> None:
    story = Story(tmp_path, seed, retention)
    checks = [(story.check(), 0)]
    for turn in range(200):
        story.anything()
        if story.rng.random() < 0.3:
            check, _ = checks[int(story.rng.integers(len(checks)))]
            check.look(1, segment_bytes=2_000)
            if turn % 2:
                check.lag_s = 100.0  # it leaves out what comes before the newest checkpoint
        if turn % 50 == 49:
            former, _ = checks[-1]
            look(former)
            checks.append((story.check(former.position or 0, former.applied), former.applied or 0))
    for check, before in checks:
        look(check)
        story.step(*sorted(story.scribe.states)[:8], frames=3)
        look(check)
        assert check.mismatches == []
        assert check.frames + check.skipped == story.frames - before, "every frame counts once"
        assert check.frames > 0


def test_every_frame_of_every_stream_is_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    check = story.check()
    for turn in range(300):
        story.anything()
        if turn % 7 == 0:
            look(check)
    look(check)
    assert (check.mismatches, check.frames, check.skipped) == ([], story.frames, 0)


@pytest.mark.parametrize("begins", ["before", "after a checkpoint", "long after"])
def test_one_wrong_output_is_found_with_the_values_and_told_once(tmp_path: Path, begins: str) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(5)]
    check = story.check()
    story.step(*streams, frames=20)
    if begins != "before":
        story.checkpoint()
        check = story.check(story.scribe.writer.position, None)
        story.step(*streams[: 2 if begins == "long after" else 5], frames=3)
    look(check)
    assert check.mismatches == []
    seq, position = story.scribe.seqs[4], story.scribe.writer.position
    story.corrupts = 4
    story.step(*streams)
    story.step(*streams, frames=2)
    look(check)
    (found,) = check.mismatches
    assert (found.stream, found.seq, found.position) == ("stream-4", seq, position + 1)
    got = story.scribe.y[4][seq]
    np.testing.assert_array_equal(np.array(found.got, np.float32), got)
    got[2] = np.float32(found.expected[2])
    np.testing.assert_array_equal(np.array(found.expected, np.float32), got)
    assert f"frame {seq}, element 2: recorded" in found.sentence
    frames = check.frames
    story.step(*streams, frames=10)
    story.corrupts = 4
    story.step(*streams)
    look(check)
    assert (check.frames, check.mismatches_total) == (frames + 44, 1), "the others are still followed"
    later = story.check(check.position or 0, check.applied)
    story.step(*streams, frames=10)
    look(later)
    assert later.mismatches == [], "the next process does not tell of it again"


def test_frames_that_are_trimmed_or_left_out_are_counted(tmp_path: Path) -> None:
    story = Story(tmp_path, retention=Retention(keep_bytes=60_000))
    streams = [story.open() for _ in range(3)]
    check = story.check()
    story.step(*streams, frames=3)
    look(check)
    story.scribe.step(streams, "failed")
    story.step(*streams, frames=2)
    story.checkpoint()
    check.lag_s = 100.0
    look(check)
    assert (check.frames, check.skipped, check.has_trimmed) == (9, 6, False)
    story.trim()
    story.step(*streams)
    look(check)
    assert check.has_trimmed
    assert check.frames + check.skipped == check.applied == story.frames
    assert check.mismatches == []


def test_frames_without_outputs_are_stepped_and_not_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    stream = story.open()
    check = story.check()
    story.scribe.step([stream], "unanswered")
    story.scribe.writer.commit()
    look(check)
    assert check.applied == 0, "its outputs may still come"
    story.scribe.writer.abandon()
    story.scribe.writer = RecordingWriter.resume(story.path, story.scribe.writer.header)
    story.step(stream, frames=4)
    look(check)
    assert (check.frames, check.skipped, check.mismatches) == (4, 1, [])


def test_the_file_is_closed_while_the_network_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    story.scribe.writer.close()  # SQLite closes no file that the same process holds locks on
    found: list[bool] = []

    def compile_it(*arguments: Any) -> Any:
        links = Path("/proc/self/fd").iterdir()
        found.append(str(story.path) in map(os.path.realpath, links))
        return build(*arguments)

    monkeypatch.setattr("instep.replay.recorded_model.build", compile_it)
    LiveCheck.of(story.path, 0, 0)
    assert found == [False]


def test_an_engine_that_promises_no_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotVerify):
        LiveCheck.of(Story(tmp_path, **NO_BITS).path, 0, 0)


def test_frames_of_a_former_engine_are_not_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(3)]
    story.corrupts = 2
    story.step(*streams, frames=5)
    story.scribe.writer.event(story.scribe.now, "engine", None, '{"arithmetic": "portable-1"}')
    story.step(*streams, frames=5)
    check = LiveCheck.of(story.path, 0, 0)
    look(check)
    assert (check.frames, check.skipped, check.mismatches) == (15, 15, [])


def test_a_checkpoint_that_is_completed_during_a_look_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(tmp_path)
    streams = [story.open() for _ in range(3)]
    story.step(*streams, frames=3)
    story.checkpoint()
    check = story.check(story.scribe.writer.position, 9)

    class Overtaken(RecordingReader):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            story.step(*streams)
            story.checkpoint()

    monkeypatch.setattr("instep.replay.following.RecordingReader", Overtaken)
    for _ in range(3):
        check.look()
    check.lag_s = 100.0
    check.look()
    monkeypatch.undo()
    story.step(*streams)
    look(check)
    assert (check.mismatches, check.frames + check.skipped) == ([], story.frames - 9)
    assert check.frames > 0


def test_it_is_as_late_as_the_first_batch_that_it_has_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    stream = story.open()
    check = story.check()
    story.step(stream)  # long ago
    monkeypatch.setattr(Scribe, "now", time.time_ns() - 5 * 10**9)
    story.scribe.step([stream], "unanswered")  # what has outputs is read apart from what has none
    story.scribe.writer.event(story.scribe.now, "recovered", None, "")
    story.step(stream)
    assert not check.look(1, segment_bytes=1)
    assert 5 <= check.lag_s < 60
