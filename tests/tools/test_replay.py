from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import F32, Kind, ServerInfo
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.replay import ReplayJob, replay
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import FakeServer, Message, error, reference
from tests.support.rows import close_stream, open_stream
from tests.support.states import gru_state
from tests.tools.helpers import JumpingClock, RememberingTerminal, info_with, save_table
from tests.tools.producing import end_at_block

LENGTHS = [4, 1, 6, 3]
NAMES = ("mic-1", "mic-2", "tap-1", "tap-2")


class Run:
    """One run of the command against a fake server."""

    def __init__(self, as_json: bool = False, info: ServerInfo | None = None) -> None:
        self.terminal = RememberingTerminal(as_json)
        self.stop = Stop()
        self.clock = JumpingClock()
        self.server = FakeServer(info or info_with())

    async def __call__(self, file: Path, **what: Any) -> Exit:
        with self.server as server:
            ending = await replay(
                ReplayJob(Target(server.endpoint), file, **what), self.terminal, self.stop, self.clock
            )
            assert server.rules.names == {}, "streams are left open"
        return ending


def truth(frames: F32, lengths: list[int], states: dict[int, F32] | None = None) -> F32:
    parts = np.split(frames, np.cumsum(lengths)[:-1])
    return np.concatenate([reference(x, (states or {}).get(row))[0] for row, x in enumerate(parts)])


@pytest.fixture
def recorded(rng: np.random.Generator) -> RecordedSequences:
    frames = rng.integers(-5, 6, (sum(LENGTHS), 3)).astype(np.float32)
    return RecordedSequences(NAMES, np.array(LENGTHS), frames, outputs=truth(frames, LENGTHS), fingerprint="00")


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
    assert run.terminal.said.startswith("14 frames of 4 streams in 0.0 s")
    assert run.terminal.said.strip().endswith(f"; saved in {tmp_path / 'again.npz'}")
    assert sum(steps * streams for steps, streams in run.server.rules.blocks) == 14
    assert await Run()(file, save=tmp_path / "again.csv") == Exit.OK
    assert len((tmp_path / "again.csv").read_text().splitlines()) == 15


async def test_equal_outputs_of_streams_that_keep_their_names(file: Path) -> None:
    run = Run()
    opened: list[str] = []

    def watch(header: list[Any], frames: list[bytes]) -> None:
        opened.extend(name for name in run.server.rules.names if name not in opened)

    run.server.rules.fault = watch
    assert await run(file, check=True) == Exit.OK
    assert tuple(opened) == NAMES
    assert "all 14 equal those in the file, bit for bit" in run.terminal.said


async def test_a_name_that_is_in_use_gets_a_suffix(file: Path) -> None:
    run = Run()
    run.server.rules.names["tap-1"] = 999
    with run.server as server:
        what = ReplayJob(Target(server.endpoint), file, check=True)
        assert await replay(what, run.terminal, run.stop, run.clock) == Exit.OK
    assert run.server.rules.names == {"tap-1": 999}


async def test_a_flipped_bit_is_found(tmp_path: Path, recorded: RecordedSequences) -> None:
    assert recorded.outputs is not None
    recorded.outputs.view(np.uint32)[7, 1] ^= 1
    save_table(tmp_path / "r.npz", recorded)
    run = Run()
    assert await run(tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    assert "first difference: stream 'tap-1', frame 2, element 1: recorded " in run.terminal.said
    assert "1 of 14 frames differ from those in the file, in 1 stream" in run.terminal.said
    run = Run(as_json=True)
    assert await run(tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    check = run.terminal.json()["check"]
    assert (check["different"], check["first"]["stream"], check["first"]["frame"]) == (1, "tap-1", 2)


async def test_json(file: Path) -> None:
    run = Run(as_json=True)
    assert await run(file) == Exit.OK
    assert run.terminal.json() == {
        "streams": 4,
        "frames": 14,
        "answered_frames": 14,
        "seconds": 0.0,
        "exactness": "exact",
        "saved": None,
        "stopped": False,
        "check": None,
    }


@pytest.mark.parametrize(("speed", "last_s"), [(None, 0.5), (1.0, 0.5), (2.0, 0.25), (math.inf, 0.0)])
async def test_a_rate_is_kept_in_real_time(file: Path, speed: float | None, last_s: float) -> None:
    run = Run()
    what: dict[str, Any] = {"speed": speed, "rate_hz": 10.0, "check": True}
    assert await run(file, **what) == Exit.OK
    assert run.clock.now() - 1000 == pytest.approx(last_s)
    assert "all 14 equal" in run.terminal.said


async def test_more_sequences_than_the_server_keeps(file: Path) -> None:
    for what in ({}, {"rate_hz": 10.0}):
        run = Run(info=info_with(max_streams=3))
        most: list[int] = []

        def watch(header: list[Any], frames: list[bytes], run: Run = run, most: list[int] = most) -> None:
            most.append(len(run.server.rules.names))

        run.server.rules.fault = watch
        assert await run(file, check=True, **what) == Exit.OK
        assert max(most) == 3
        assert "all 14 equal" in run.terminal.said


def without_the_first_frame(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",123,123" for line in lines[1:]]


def with_outputs_of_nan(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",nan,nan" for line in lines]


@pytest.mark.parametrize(
    ("damage", "compared", "note"),
    [
        (without_the_first_frame, "8 of 13", "1 stream ('tap-1') begins after the first"),
        (with_outputs_of_nan, "8 of 14", "6 frames have no output in the file, as when a server was killed before it"),
        (
            lambda lines: [*lines[:-1], *with_outputs_of_nan(lines[-1:])],
            "13 of 14",
            "1 frame has no output in the file",
        ),
    ],
)
@pytest.mark.parametrize("differs", [False, True])
async def test_frames_that_cannot_be_compared_are_no_success(
    tmp_path: Path, file: Path, damage: Callable[[list[str]], list[str]], compared: str, note: str, differs: bool
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
    assert (
        f"{compared} frames were compared: {'1 of' if differs else 'all'} {compared.split()[0]} " in run.terminal.said
    )
    assert note in " ".join(run.terminal.complained.split())
    run = Run(as_json=True)
    await run(tmp_path / "t.csv", check=True)
    check = run.terminal.json()["check"]
    assert f"{check['frames']} of {check['total']}" == compared


async def test_a_stream_that_was_not_chosen_is_not_warned_about(tmp_path: Path, file: Path) -> None:
    assert await Run()(file, save=tmp_path / "t.csv") == Exit.OK
    lines = (tmp_path / "t.csv").read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if line.startswith('"tap-1",')))
    (tmp_path / "t.csv").write_text("".join(lines))
    run = Run()
    assert await run(tmp_path / "t.csv", check=True, choice=Choice(only="mic-*")) == Exit.OK
    assert run.terminal.complained == ""


START_NS = 1_700_000_000_000_000_000


def write_recording(path: Path, rng: np.random.Generator) -> None:
    """Two streams called `mic` after each other, the second with an initial state; one frame a batch, 0.1 s apart."""
    description = {"features": 3, "before": [], "gru": {"hidden_size": 2, "num_layers": 2}, "after": []}
    header = RecordingHeader(
        instep_version="0",
        created_ns=START_NS,
        model_name="m",
        model_folder="",
        description=description,
        features=3,
        outputs=2,
        state=gru_state(2, 2).encode(),
        model_fingerprint="00",
        arithmetic="portable-1",
        durability="memory",
    )
    writer = RecordingWriter.create(path, header)
    x = rng.integers(-5, 6, (8, 3)).astype(np.float32)
    state = np.full((2, 2), 3, np.float32)
    y = np.concatenate([reference(x[:4])[0], reference(x[4:], state)[0]])
    for frame in range(8):
        stream, seq = 1 + frame // 4, frame % 4
        time_ns = START_NS + frame * 100_000_000
        if seq == 0:
            open_stream(writer, stream, "mic", stream, 0, time_ns, state if stream == 2 else None)
        ids, seqs = np.array([stream], np.uint32), np.array([seq], np.uint64)
        batch = writer.add_inputs(time_ns, ids, seqs, x[frame : frame + 1])
        writer.add_outputs(time_ns, batch, y[frame : frame + 1])
        if seq == 3:
            close_stream(writer, stream, time_ns, "closed", 4, None)
    writer.close()


@pytest.mark.parametrize(("speed", "last_s"), [(None, 0.7), (2.0, 0.35), (math.inf, 0.0)])
async def test_a_recording_is_run_again_at_its_times(
    tmp_path: Path, rng: np.random.Generator, speed: float | None, last_s: float
) -> None:
    write_recording(tmp_path / "r.db", rng)
    run = Run()
    assert await run(tmp_path / "r.db", speed=speed, check=True, save=tmp_path / "again.npz") == Exit.OK
    assert run.clock.now() - 1000 == pytest.approx(last_s)
    assert "all 8 equal those in the file" in run.terminal.said
    run = Run()
    assert await run(tmp_path / "again.npz", speed=math.inf, check=True) == Exit.OK
    assert "all 8 equal those in the file" in run.terminal.said


@pytest.mark.parametrize(("last_s", "speed", "said"), [(7200, None, True), (7200, 1.0, False), (50, None, False)])
async def test_a_long_replay_says_that_it_keeps_real_time(
    tmp_path: Path, last_s: int, speed: float | None, said: bool
) -> None:
    (tmp_path / "day.csv").write_text(f"at_s,x0,x1,x2\n0,1,2,3\n{last_s},4,5,6\n")
    run = Run()
    assert await run(tmp_path / "day.csv", speed=speed, choice=Choice(time="at_s")) == Exit.OK
    sentence = "replaying in real time, which takes 120 minutes; --speed max is as fast as possible"
    assert (sentence in run.terminal.complained.splitlines()) == said


async def test_streams_open_when_they_did(tmp_path: Path, rng: np.random.Generator) -> None:
    write_recording(tmp_path / "r.db", rng)
    run = Run(info=info_with(max_streams=1))
    assert await run(tmp_path / "r.db", check=True) == Exit.OK
    rules = run.server.rules
    assert rules.kinds.index(Kind.CLOSE) < len(rules.kinds) - 1 - rules.kinds[::-1].index(Kind.OPEN)


async def test_a_stop_drains_closes_and_saves_what_there_is(tmp_path: Path, file: Path) -> None:
    run = Run()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1000.25 else None
    what: dict[str, Any] = {"rate_hz": 10.0, "save": tmp_path / "part.npz", "check": True}
    assert await run(file, **what) == Exit.COULD_NOT_RUN
    part = read_sequences(tmp_path / "part.npz")
    assert part.lengths.tolist() == [3, 1, 3, 3]
    assert "10 frames of 4 streams" in run.terminal.said
    assert (
        "; 4 frames were not sent: stopped, all streams closed; 10 of 14 frames were compared: all 10 equal"
        in run.terminal.said
    )


@pytest.mark.parametrize("check", [True, False])
async def test_streams_that_the_server_ends(file: Path, check: bool) -> None:
    run = Run()
    end_at_block(run.server, 3, handle=3, code=Code.STATE_LOST)
    ending = await run(file, rate_hz=10.0, check=check)
    assert ending == (Exit.COULD_NOT_RUN if check else Exit.FOUND_PROBLEMS)
    assert run.terminal.complained.count("(stream 'tap-1'") >= 1
    assert "4 frames got no answer: the server refused them" in run.terminal.said
    assert ("all 10 equal those in the file" in run.terminal.said) == check


async def test_whole_blocks_that_are_refused(file: Path) -> None:
    run = Run()
    rules = run.server.rules

    def refuse(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None

    rules.fault = refuse
    assert await run(file) == Exit.FOUND_PROBLEMS
    assert "TOO_LARGE" in run.terminal.complained
    assert "0 frames of 4 streams" in run.terminal.said


@pytest.mark.parametrize(
    ("changes", "what", "named"),
    [
        ({"outputs": None}, {"check": True}, "no columns y0"),
        ({}, {"speed": 2.0}, "--rate"),
        ({"fingerprint": "ff" * 32}, {"check": True}, "ffffffffffff and 00"),
        ({"outputs": np.zeros((14, 5), np.float32)}, {"check": True}, "5 outputs"),
        ({"frames": np.zeros((14, 2), np.float32), "fingerprint": "ff" * 32, "model": "ears"}, {}, "'ears'.*--model"),
        ({"frames": np.zeros((14, 4), np.float32)}, {}, "--columns"),
        ({}, {"save": Path("y.txt")}, "y.txt"),
    ],
)
async def test_what_cannot_be_is_told(
    tmp_path: Path, recorded: RecordedSequences, changes: dict[str, Any], what: dict[str, Any], named: str
) -> None:
    save_table(tmp_path / "r.npz", replace(recorded, **changes))
    run = Run()
    with pytest.raises(CommandProblem, match=named):
        await run(tmp_path / "r.npz", **what)
    assert run.server.rules.names == {}
