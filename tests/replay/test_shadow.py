"""A candidate beside the version that is served: its outputs are compared, and nobody is answered with them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.core.typing import F32
from instep.interrupts import ENDINGS, end_at_once, raise_stopped
from instep.models.folder import write_model
from instep.models.model import Model
from instep.program import app
from instep.recording.trim import Retention
from instep.replay.shadow import COMPARED, DIFFERS, NOT_COMPARED, Differences, Shadow, Shadowing, make_shadow, run
from instep.server.server import Server
from instep_client import AsyncClient
from tests.support.growing import Story
from tests.support.models import plain, whole
from tests.support.running import running

SERVED = plain(5, 8)
RETRAINED = plain(5, 8, seed=9)
DEEPER = plain(5, 8, layers=2)


@dataclass
class Place:
    """Where the server records, and where candidates are."""

    root: Path

    def asked(self, candidate: Model, **changes: Any) -> Shadowing:
        folder = self.root / candidate.fingerprint
        write_model(folder, candidate, overwrite=True)
        asked = Shadowing(self.recording, folder, 1.0, seconds=0.0, warm_up=None, tolerance=None, json=True)
        return replace(asked, **changes)

    @property
    def recording(self) -> Path:
        return self.root / "a.instep"

    @property
    def sections(self) -> dict[str, Any]:
        return {"recording": {"path": self.recording}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def follow(server: Server, shadow: Shadow) -> None:
    """Once the recording holds all outputs; nobody else waits for those."""
    journal = server.default.engine.journal
    await journal.committed(journal.newest)
    shadow.follow()


def assert_differs_as(report: Differences, pairs: list[tuple[F32, F32]]) -> None:
    """As outputs of the candidate differ from those that were served."""
    apart = [np.abs(candidate.astype(np.float64) - served) for candidate, served in pairs]
    frames = np.concatenate([each.max(axis=1) for each in apart])
    assert report.frames == len(frames)
    assert report.equal == sum(int((c.view("u4") == s.view("u4")).all(axis=1).sum()) for c, s in pairs)
    assert report.largest == frames.max()
    assert report.mean == pytest.approx(np.concatenate(apart).mean())
    for share, value in report.quantiles.items():
        assert value == pytest.approx(np.quantile(frames, share, method="inverted_cdf"), rel=0.1)
    assert [each.largest for each in report.streams] == sorted((each.max() for each in apart), reverse=True)


async def test_it_begins_with_the_states_of_the_served_version_and_meets_every_later_frame(
    place: Place, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((4, 70, 5)).astype(np.float32)
    async with running(SERVED, **place.sections) as server, AsyncClient(server.endpoint) as client:
        streams = [await client.open(f"s{number}") for number in range(3)]
        for number, stream in enumerate(streams):
            await stream.step(x[number, :40])
        await server.default.checkpoints.take()
        shadow = make_shadow(place.asked(RETRAINED))
        await follow(server, shadow)
        assert shadow.report().frames == 0
        served = [await stream.step(x[number, 40:55]) for number, stream in enumerate(streams)]
        await follow(server, shadow)
        late = await client.open("late")
        served.append(await late.step(x[3]))
        await streams[0].close()
        _, state = await streams[1].read_state()
        await streams[2].reset(state)
        served += [await stream.step(x[number, 55:]) for number, stream in enumerate(streams) if number]
        await follow(server, shadow)
        assert not shadow.is_finished
    shadow.follow()
    assert shadow.is_finished

    def from_a(number: int, first: int) -> tuple[F32, F32]:
        state = whole(SERVED, x[number, :first])[1]
        return whole(RETRAINED, x[number, first:55], state)

    expected = [from_a(number, 40) for number in range(3)]
    after = [
        whole(RETRAINED, x[1, 55:], expected[1][1])[0],
        whole(RETRAINED, x[2, 55:], whole(SERVED, x[1, :55])[1])[0],
    ]
    new = whole(RETRAINED, x[3])[0]
    pairs = [
        (expected[0][0], served[0]),
        (np.concatenate([expected[1][0], after[0]]), np.concatenate([served[1], served[4]])),
        (np.concatenate([expected[2][0], after[1]]), np.concatenate([served[2], served[5]])),
        (new, served[3]),
    ]
    assert_differs_as(shadow.report(), pairs)


@pytest.mark.parametrize("candidate", [DEEPER, RETRAINED], ids=["other state", "on request"])
async def test_a_warm_up_is_not_compared(place: Place, rng: np.random.Generator, candidate: Model) -> None:
    x = rng.standard_normal((60, 5)).astype(np.float32)
    async with running(SERVED, **place.sections) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        await stream.step(x[:20])
        await server.default.checkpoints.take()
        await stream.step(x[20:40])
        shadow = make_shadow(place.asked(candidate, warm_up=25))
        await follow(server, shadow)
        assert shadow.report().frames == 0
        served = await stream.step(x[40:])
        await follow(server, shadow)
        assert_differs_as(shadow.report(), [(whole(candidate, x[20:])[0][25:], served[5:])])


async def test_a_share_of_the_streams_is_followed(place: Place, rng: np.random.Generator) -> None:
    async with running(SERVED, **place.sections) as server, AsyncClient(server.endpoint) as client:
        for number in range(64):
            await (await client.open(f"s{number}")).step(rng.standard_normal((10, 5)).astype(np.float32))
        shadow = make_shadow(place.asked(SERVED, share=0.5))
        await follow(server, shadow)
        report = shadow.report()
        assert 10 < shadow.following < 54
        assert report.frames == report.equal == 10 * shadow.following
        assert {each.frames for each in report.streams} == {10}


@contextmanager
def stopped_by(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A signal comes as soon as the candidate has followed for a while."""
    follow, before = Shadow.follow, {number: signal.getsignal(number) for number in ENDINGS}

    def and_stop(shadow: Shadow) -> bool:
        is_all = follow(shadow)
        signal.raise_signal(number)
        return is_all

    end_at_once()
    raise_stopped()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Shadow, "follow", and_stop)
            yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


async def test_what_it_says_and_its_status(
    place: Place, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((30, 5)).astype(np.float32)

    def said(candidate: Model, **changes: Any) -> tuple[int, str]:
        out = StringIO()
        return run(place.asked(candidate, **changes), Console(file=out, width=80)), out.getvalue()

    async with running(SERVED, **place.sections) as server, AsyncClient(server.endpoint) as client:
        served = await (await client.open("[/mic]")).step(x)
        journal = server.default.engine.journal
        await journal.committed(journal.newest)
        largest = float(np.abs(whole(RETRAINED, x)[0].astype(np.float64) - served).max())
        status, text = said(RETRAINED)
        found = json.loads(text)
        assert (status, found["frames"], found["largest"]) == (COMPARED, 30, largest)
        assert found["streams"] == [{"name": "[/mic]", "frames": 30, "largest": largest}]
        assert said(RETRAINED, tolerance=largest)[0] == COMPARED
        assert said(RETRAINED, tolerance=largest * 0.99)[0] == DIFFERS
        assert said(SERVED, tolerance=0.0)[0] == COMPARED
        status, text = said(SERVED, json=False)
        assert status == COMPARED
        for words in ("[/mic]", "30 frames of 1 stream were", "100.0% have equal bits"):
            assert words in text
        assert all(len(line) <= 80 for line in text.splitlines())
        assert said(RETRAINED, share=0.0)[0] == NOT_COMPARED
        with stopped_by(signal.SIGTERM, monkeypatch):
            status, text = said(SERVED, seconds=None)
        assert (status, json.loads(text)["frames"]) == (COMPARED, 30)
    niceness: list[int] = []
    monkeypatch.setattr(os, "nice", niceness.append)
    for candidate, words in ((RETRAINED, "nothing was compared"), (plain(5, 9), "has 9 outputs, and")):
        asked = place.asked(candidate)
        result = CliRunner().invoke(app, ["model", "shadow", str(asked.recording), str(asked.folder), "--for", "60"])
        assert (result.exit_code, words in " ".join(result.output.split())) == (NOT_COMPARED, True), result.output
    assert niceness == [19, 19]


def asked_of(story: Story, warm_up: int | None = None) -> Shadowing:
    return Shadowing(story.path, story.folder, 1.0, seconds=0.0, warm_up=warm_up, tolerance=None, json=True)


def test_streams_that_come_and_go_between_two_looks_are_compared(tmp_path: Path) -> None:
    story = Story(tmp_path)
    staying = [story.open(), story.open()]
    shadow = make_shadow(asked_of(story))
    shadow.follow()
    for number in range(60):
        coming = [story.open(), story.open()]
        story.step(*staying, *coming)
        story.corrupts = 3 if number == 40 else 0
        story.step(*coming, *staying[1:], frames=2)
        story.scribe.reset(coming[1], story.scribe.random_state())
        for stream in coming:
            story.step(*coming)
            story.scribe.close(stream)
            coming = [each for each in coming if each != stream]
        if number % 20 == 10:
            shadow.follow()
    story.scribe.writer.commit()
    shadow.follow()
    report = shadow.report()
    assert (report.frames, report.streams_total) == (story.frames, 122)
    assert [(each.name, each.frames) for each in report.streams[:1]] == [("stream-2", 180)]
    assert report.largest == report.streams[0].largest == pytest.approx(0.25, abs=1e-5)
    assert report.streams[1].largest < 1e-5


def test_a_history_that_was_trimmed_meanwhile_is_followed_from_its_newest_states(tmp_path: Path) -> None:
    story = Story(tmp_path, retention=Retention(keep_bytes=100_000))
    streams = [story.open() for _ in range(4)]
    shadow = make_shadow(asked_of(story))
    story.step(*streams)
    shadow.follow()
    for _ in range(3):
        newest = story.scribe.writer.position
        while story.scribe.writer.trimmed.position <= newest:
            story.trim()
        shadow.follow()
        compared = shadow.report().frames
        story.step(*streams, frames=9)
        shadow.follow()
        found = shadow.report()
        assert (found.frames - compared, found.streams_total, found.equal) == (36, 4, found.frames)


@pytest.mark.parametrize("warm_up", [None, 5])
def test_frames_that_a_killed_server_left_without_outputs_are_not_compared(tmp_path: Path, warm_up: int | None) -> None:
    story = Story(tmp_path)
    stream = story.open()
    is_fresh = not story.scribe.states[stream].any()
    story.step(stream, frames=3)
    story.scribe.step([stream], "unanswered")
    story.scribe.writer.event(story.scribe.now, "recovered", None, "")
    story.step(stream, frames=3)
    shadow = make_shadow(asked_of(story, warm_up))
    shadow.follow()
    assert shadow.report().frames == (6 if warm_up is None or is_fresh else 2)
    assert warm_up is not None or shadow.report().largest < 1e-5
