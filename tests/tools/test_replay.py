from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import F32, Kind
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.replay import ReplayJob, compare, replay
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import FakeServer, error, reference
from tests.tools.helpers import JumpingClock, RememberingTerminal, info_with, save_table
from tests.tools.producing import end_at_block

LENGTHS = [4, 1, 6, 3]
NAMES = ("mic-1", "mic-2", "tap-1", "tap-2")


class Run:
    """One run of the command against a fake server."""

    def __init__(self, as_json: bool = True, **info: Any) -> None:
        self.terminal = RememberingTerminal(as_json)
        self.stop = Stop()
        self.clock = JumpingClock()
        self.server = FakeServer(info_with(**info))
        self.opened: dict[str, None] = {}
        self.most_open = 0
        self.server.rules.fault = self._watch
        self.keeps: set[str] = set()
        """Streams of others."""

    async def __call__(self, file: Path, **what: Any) -> Exit:
        with self.server as server:
            job = ReplayJob(Target(server.endpoint), file, **what)
            ending = await replay(job, self.terminal, self.stop, self.clock)
            assert server.rules.names.keys() == self.keeps, "streams are left open"
        return ending

    @property
    def compared(self) -> tuple[int, int]:
        """The number of frames that were compared, and of those that differ."""
        check = self.terminal.json()["check"]
        return check["frames"], check["different"]

    def _watch(self, header: list[Any], frames: list[bytes]) -> None:
        self.opened |= dict.fromkeys(self.server.rules.names)
        self.most_open = max(self.most_open, len(self.server.rules.names))


def truth(frames: F32, states: dict[int, F32] | None = None) -> F32:
    parts = np.split(frames, np.cumsum(LENGTHS)[:-1])
    return np.concatenate([reference(x, (states or {}).get(row))[0] for row, x in enumerate(parts)])


@pytest.fixture
def recorded(rng: np.random.Generator) -> RecordedSequences:
    frames = rng.integers(-5, 6, (sum(LENGTHS), 3)).astype(np.float32)
    return RecordedSequences(NAMES, np.array(LENGTHS), frames, outputs=truth(frames), fingerprint="00")


@pytest.fixture
def file(tmp_path: Path, recorded: RecordedSequences) -> Path:
    save_table(tmp_path / "recorded.npz", recorded)
    return tmp_path / "recorded.npz"


async def test_outputs_are_saved(tmp_path: Path, file: Path, recorded: RecordedSequences) -> None:
    run = Run()
    assert await run(file, save=tmp_path / "again.npz") == Exit.OK
    again = read_sequences(tmp_path / "again.npz")
    assert recorded.outputs is not None
    assert again.outputs is not None
    np.testing.assert_array_equal(again.outputs, recorded.outputs)
    np.testing.assert_array_equal(again.frames, recorded.frames)
    assert again.names == NAMES
    assert sum(steps * streams for steps, streams in run.server.rules.blocks) == 14
    counts = {"streams": 4, "frames": 14, "answered_frames": 14, "seconds": 0.0, "exactness": "exact"}
    ending = {"saved": str(tmp_path / "again.npz"), "stopped": False, "check": None}
    assert run.terminal.json() == counts | ending


async def test_streams_keep_their_names_and_get_a_suffix_where_one_is_in_use(file: Path) -> None:
    run = Run(as_json=False)
    run.server.rules.occupy("tap-1")
    run.keeps = {"tap-1"}
    assert await run(file, check=True) == Exit.OK
    names = list(run.opened)
    assert set(names) - {names[3]} == set(NAMES)
    assert names[3].startswith("tap-1~")
    assert "all 14 equal those in the file, bit for bit" in run.terminal.said


async def test_a_flipped_bit_is_found(tmp_path: Path, recorded: RecordedSequences) -> None:
    assert recorded.outputs is not None
    recorded.outputs.view(np.uint32)[7, 1] ^= 1
    save_table(tmp_path / "r.npz", recorded)
    run = Run()
    assert await run(tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    first = run.terminal.json()["check"]["first"]
    assert (run.compared, first["stream"], first["frame"], first["element"]) == ((14, 1), "tap-1", 2, 1)
    run = Run(as_json=False)
    assert await run(tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    assert "stream 'tap-1', frame 2, element 1" in run.terminal.said


def test_the_same_nan_is_equal_and_zeros_have_signs(recorded: RecordedSequences) -> None:
    y = np.array([[0.0, np.nan]] * 14, np.float32)
    answered = np.ones(14, np.bool_)
    for now, different in ((y.copy(), 0), (np.copysign(y, np.array([[-1, 1]], np.float32)), 14)):
        assert compare(replace(recorded, outputs=y), now, answered).different == different


@pytest.mark.parametrize(("speed", "last_s"), [(None, 0.5), (2.0, 0.25), (math.inf, 0.0)])
async def test_a_rate_is_kept_in_real_time(file: Path, speed: float | None, last_s: float) -> None:
    run = Run()
    assert await run(file, speed=speed, rate_hz=10.0, check=True) == Exit.OK
    assert run.clock.now() - 1000 == pytest.approx(last_s)
    assert run.compared == (14, 0)


@pytest.mark.parametrize("rate_hz", [None, 10.0])
async def test_more_sequences_than_the_server_keeps(file: Path, rate_hz: float | None) -> None:
    run = Run(max_streams=3)
    assert await run(file, check=True, rate_hz=rate_hz) == Exit.OK
    assert (run.most_open, run.compared) == (3, (14, 0))


def without_the_first_frame(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",123,123" for line in lines[1:]]


def with_outputs_of_nan(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",nan,nan" for line in lines]


@pytest.mark.parametrize(
    ("damage", "compared", "named"),
    [(without_the_first_frame, 8, "'tap-1'"), (with_outputs_of_nan, 8, "6 frames")],
)
@pytest.mark.parametrize("differs", [False, True])
async def test_frames_that_cannot_be_compared_are_no_success(
    tmp_path: Path, file: Path, damage: Callable[[list[str]], list[str]], compared: int, named: str, differs: bool
) -> None:
    assert await Run()(file, save=tmp_path / "t.csv") == Exit.OK
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    one = [row for row in rows if row.startswith('"tap-1",')]
    others = [row for row in rows if row not in one]
    if differs:
        others[0] = others[0].rsplit(",", 1)[0] + ",123"
    (tmp_path / "t.csv").write_text("\n".join([header, *damage(one), *others, ""]))
    run = Run()
    assert await run(tmp_path / "t.csv", check=True) == (Exit.FOUND_PROBLEMS if differs else Exit.COULD_NOT_RUN)
    assert run.compared == (compared, differs)
    assert named in run.terminal.complained
    chosen = Run()
    assert await chosen(tmp_path / "t.csv", check=True, choice=Choice(only="tap-2")) == Exit.OK
    assert len(chosen.terminal.complained.splitlines()) == 1


@pytest.mark.parametrize(("speed", "last_s"), [(None, 1.4), (2.0, 0.7), (math.inf, 0.0)])
async def test_streams_of_one_name_replay_at_their_times_with_their_states(
    tmp_path: Path, recorded: RecordedSequences, speed: float | None, last_s: float
) -> None:
    state = np.full((2, 2), 3, np.float32)
    times_ns = np.arange(14) * 10**8 + np.repeat(np.arange(4), LENGTHS) * 3 * 10**7
    again = replace(recorded, names=("mic",) * 4, times_ns=times_ns, initial_states={1: {"h": state}})
    save_table(tmp_path / "r.npz", replace(again, outputs=truth(recorded.frames, {1: state})))
    run = Run(max_streams=4 if speed == math.inf else 2)
    assert await run(tmp_path / "r.npz", speed=speed, check=True, save=tmp_path / "again.npz") == Exit.OK
    assert run.clock.now() - 1000 == pytest.approx(last_s, abs=0.011)
    assert run.compared == (14, 0)
    assert list(run.opened) == ["mic", "mic-2", "mic-3", "mic-4"]
    run = Run()
    assert await run(tmp_path / "again.npz", speed=math.inf, check=True) == Exit.OK
    assert run.compared == (14, 0)


@pytest.mark.parametrize(("last_s", "speed", "said"), [(7200, None, True), (7200, 1.0, False), (50, None, False)])
async def test_a_long_replay_says_that_it_keeps_real_time(
    tmp_path: Path, last_s: int, speed: float | None, said: bool
) -> None:
    (tmp_path / "day.csv").write_text(f"at_s,x0,x1,x2\n0,1,2,3\n{last_s},4,5,6\n")
    run = Run()
    assert await run(tmp_path / "day.csv", speed=speed, choice=Choice(time="at_s")) == Exit.OK
    assert ("120 minutes" in run.terminal.complained) == said


async def test_a_stop_drains_closes_and_saves_what_there_is(tmp_path: Path, file: Path) -> None:
    run = Run()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1000.25 else None
    assert await run(file, rate_hz=10.0, save=tmp_path / "part.npz", check=True) == Exit.COULD_NOT_RUN
    assert read_sequences(tmp_path / "part.npz").lengths.tolist() == [3, 1, 3, 3]
    assert (run.compared, run.terminal.json()["stopped"]) == ((10, 0), True)


@pytest.mark.parametrize("check", [True, False])
async def test_streams_that_the_server_ends(file: Path, check: bool) -> None:
    run = Run()
    end_at_block(run.server, 3, handle=3, code=Code.STATE_LOST)
    ending = await run(file, rate_hz=10.0, check=check)
    assert ending == (Exit.COULD_NOT_RUN if check else Exit.FOUND_PROBLEMS)
    assert "(stream 'tap-1'" in run.terminal.complained
    assert run.terminal.json()["answered_frames"] == 10


async def test_whole_blocks_that_are_refused(file: Path) -> None:
    run = Run()
    run.server.rules.fault = lambda header, frames: (
        [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None
    )
    assert await run(file) == Exit.FOUND_PROBLEMS
    assert "TOO_LARGE" in run.terminal.complained
    assert run.terminal.json()["answered_frames"] == 0


@pytest.mark.parametrize(
    ("changes", "what", "named"),
    [
        ({"outputs": None}, {"check": True}, "r.npz"),
        ({}, {"speed": 2.0}, "--rate"),
        ({"fingerprint": "ff" * 32}, {"check": True}, "ffffffffffff"),
        ({"outputs": np.zeros((14, 5), np.float32)}, {"check": True}, "5 outputs"),
        ({"frames": np.zeros((14, 2), np.float32), "fingerprint": "ff" * 32, "model": "ears"}, {}, "--model"),
        ({}, {"save": Path("y.txt")}, "y.txt"),
    ],
)
async def test_what_cannot_be_is_told(
    tmp_path: Path, recorded: RecordedSequences, changes: dict[str, Any], what: dict[str, Any], named: str
) -> None:
    save_table(tmp_path / "r.npz", replace(recorded, **changes))
    with pytest.raises(CommandProblem, match=named):
        await Run()(tmp_path / "r.npz", **what)
