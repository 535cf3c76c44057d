"""The commands while the server forgets every connection again and again, and keeps the streams."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from instep_client.protocol.wire import F32, Kind
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.pacing import Pace, Stop, WallClock
from instep_tools.problems import Exit
from instep_tools.send import SendJob, send
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import RING_INFO, FakeRules, FakeServer, Message, goodbye, reference
from tests.tools.helpers import RememberingTerminal, save_table


class Forgetful:
    """A server that is restarted before every so many STEPs that it reads."""

    def __init__(self, every: int, most: int = 5) -> None:
        self.rules = FakeRules(RING_INFO)
        self.server = FakeServer(handle=self._handle)
        self._every = every
        self._most = most
        self._steps = 0

    def _handle(self, peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        if frames[0][0] == Kind.STEP:
            self._steps += 1
            if self._steps % self._every == 0 and self.rules.boots < self._most:
                self.rules.restart()
        return self.rules.handle(peer, frames)


async def test_lines_are_not_lost_and_printed_once(tmp_path: Path, rng: np.random.Generator) -> None:
    frames: F32 = rng.standard_normal((60, 3)).astype(np.float32)
    rows = (f"p-{row % 3} {' '.join(map(str, frame))}\n" for row, frame in enumerate(frames))
    (tmp_path / "in").write_text("".join(rows))
    terminal, forgetful = RememberingTerminal(), Forgetful(3)
    with forgetful.server as server, (tmp_path / "in").open() as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", lines)
        wanted = SendJob(Target(server.endpoint), choice=Choice(named=True))
        assert await send(wanted, terminal, Stop(), WallClock()) == Exit.OK
    assert forgetful.rules.boots > 1
    printed = [line.split(",") for line in terminal.data.splitlines()[1:]]
    for stream in range(3):
        mine = [row for row in printed if row[0] == f"p-{stream}"]
        assert [int(row[1]) for row in mine] == list(range(20))
        outputs = np.array([row[2:] for row in mine], np.float32)
        np.testing.assert_array_equal(outputs, reference(frames[stream::3])[0])
    assert forgetful.rules.streams == {}


async def test_a_file_gets_every_output(tmp_path: Path, rng: np.random.Generator) -> None:
    lengths = [40, 7, 25]
    frames: F32 = rng.integers(-5, 6, (sum(lengths), 3)).astype(np.float32)
    truth = np.concatenate([reference(part)[0] for part in np.split(frames, np.cumsum(lengths)[:-1])])
    recorded = RecordedSequences(("a", "b", "c"), np.array(lengths), frames, outputs=truth, fingerprint="00")
    save_table(tmp_path / "recorded.npz", recorded)
    terminal, forgetful = RememberingTerminal(), Forgetful(4)
    with forgetful.server as server:
        wanted = SendJob(
            Target(server.endpoint), file=tmp_path / "recorded.npz", check=True, output=tmp_path / "again.npz"
        )
        assert await send(wanted, terminal, Stop(), WallClock()) == Exit.OK
    assert forgetful.rules.boots > 1
    again = read_sequences(tmp_path / "again.npz")
    assert again.outputs is not None
    np.testing.assert_array_equal(again.outputs, truth)


async def test_a_stop_while_the_connection_is_lost_ends_the_command_and_reports(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.ones((5000, 3), np.float32))
    terminal, stop, rules = RememberingTerminal(as_json=True), Stop(), FakeRules(RING_INFO)
    loop, steps = asyncio.get_running_loop(), 0

    def handle(peer: bytes, parts: list[bytes]) -> list[tuple[bytes, Message]]:
        nonlocal steps
        steps += parts[0][0] == Kind.STEP
        if steps < 4:
            return rules.handle(peer, parts)
        loop.call_soon_threadsafe(stop.request)
        return [(peer, goodbye())] if parts[0][0] == Kind.STEP else []

    with FakeServer(handle=handle) as server, WallClock() as clock:
        job = SendJob(Target(server.endpoint), Pace(100.0), tmp_path / "in.npy")
        await asyncio.wait_for(send(job, terminal, stop, clock), 20)
    values = terminal.json()
    assert (values["answered_frames"], values["stopped"], stop.gave_up) == (3, True, True)
