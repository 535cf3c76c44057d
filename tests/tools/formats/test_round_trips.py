"""What one command writes another one reads: each command is run as users run it, and its output read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from instep.program import app
from instep.recording.schema import RESET_EVENT
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import F32
from instep_tools.formats.columns import output_columns
from instep_tools.formats.read import read_sequences
from instep_tools.formats.table import TableHeader, TableRows
from instep_tools.formats.write import WRITERS, Format, written_table
from instep_tools.problems import BadFile, CommandProblem
from tests.support.fake_server import INFO, FakeServer, reference
from tests.support.recordings import make_header
from tests.support.rows import close_stream, open_stream, stream_event
from tests.support.scribe import START_NS
from tests.support.written import DESCRIPTION
from tests.tools.formats.test_read import write_ros2

STEP_NS = 1_000_003


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def record(path: Path, rng: np.random.Generator, *, with_states: bool) -> int:
    """Three openings of two names, as the fake server would have answered them; the number of frames.

    With states, the second opening begins in a state of its own, and the third is reset twice on its way.
    """
    x = {stream: rng.integers(-5, 6, (6 + stream, 3)).astype(np.float32) for stream in (1, 2, 3)}
    state = np.full(INFO.state.leaves[0].shape, 3, np.float32)
    starts: dict[int, list[tuple[int, F32 | None]]] = {stream: [(0, None)] for stream in x}
    if with_states:
        starts |= {2: [(0, state)], 3: [(0, None), (2, state), (5, None)]}
    header = make_header(DESCRIPTION, state=INFO.state.encode(), model_fingerprint=INFO.fingerprint)
    writer = RecordingWriter.create(path, header)
    now_ns = START_NS
    for stream, name in ((1, "mic"), (3, "tap, 2"), (2, "mic")):
        frames = x[stream]
        open_stream(writer, stream, name, stream, 0, now_ns, starts[stream][0][1])
        for (begin, initial), (end, _) in pairwise([*starts[stream], (len(frames), None)]):
            if begin:
                stream_event(writer, now_ns, RESET_EVENT, stream, begin, "", initial)
            for seq, y in enumerate(reference(frames[begin:end], initial)[0], begin):
                now_ns += STEP_NS
                ids, seqs = np.array([stream], np.uint32), np.array([seq], np.uint64)
                writer.add_outputs(now_ns, writer.add_inputs(now_ns, ids, seqs, frames[seq][None]), y[None])
        if stream == 1:
            close_stream(writer, 1, now_ns, "closed", len(frames), None)
    writer.close()
    return sum(map(len, x.values()))


def client(server: FakeServer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--endpoint", server.endpoint])


@pytest.mark.parametrize("with_states", [False, True])
def test_an_export_is_replayed_and_checked(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format, with_states: bool
) -> None:
    path, again = tmp_path / f"e.{format}", tmp_path / f"again.{format}"
    frames = record(tmp_path / "r.instep", rng, with_states=with_states)
    exported = CliRunner().invoke(app, ["export", str(tmp_path / "r.instep"), "--output", str(path)])
    assert exported.exit_code == 0
    has_no_states = format == "csv" and with_states
    assert ("CSV does not hold the states" in exported.stdout) == has_no_states
    for file, more in ((tmp_path / "r.instep", []), (path, ["--output", str(again)]), (again, [])):
        checked = client(server, "send", file, "--check", "--speed", "max", "--json", *more)
        if has_no_states and file == path:
            assert checked.exit_code == 1
            return
        assert checked.exit_code == 0
        check = json.loads(checked.stdout)["check"]
        assert (check["frames"], check["different"]) == (frames, 0)


def test_what_is_saved_or_printed_can_be_sent_again(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format
) -> None:
    x = rng.integers(-5, 6, (12, 3)).astype(np.float32)
    lines = "".join(f"mic-{row % 2} {' '.join(map(str, frame))}\n" for row, frame in enumerate(x))
    (tmp_path / "in.txt").write_text(lines)
    path = tmp_path / f"p.{format}"
    produced = client(server, "send", tmp_path / "in.txt", "--named", "--output", path)
    assert produced.exit_code == 0, produced.stderr
    saved = read_sequences(path)
    assert (saved.names, saved.times_ns) == (("mic-0", "mic-1"), None)
    assert saved.outputs is not None
    np.testing.assert_array_equal(saved.outputs, np.concatenate([reference(x[part::2])[0] for part in (0, 1)]))
    printed = client(server, "send", path, "--format", "jsonl", "--columns", "x*", "--streams", "mic-1")
    assert [json.loads(line)["y"] for line in printed.stdout.splitlines()] == reference(x[1::2])[0].tolist()
    (tmp_path / "y.jsonl").write_text(printed.stdout)
    for file in (path, tmp_path / "y.jsonl"):
        checked = client(server, "send", file, "--check")
        assert (checked.exit_code, checked.stderr) == (0, "")


def test_columns_names_and_topics_are_chosen(tmp_path: Path, server: FakeServer) -> None:
    (tmp_path / "s.csv").write_text("at_ms,label,c,a,b\n0,up,3,1,2\n20,down,6,4,5\n")
    (tmp_path / "n.csv").write_text("mic,1,2,3\nmic,4,5,6\ntap,1,2,3\n")
    write_ros2(tmp_path / "b.mcap")
    rows = [[1, 2, 3], [4, 5, 6]]
    for file, flags, names, frames in (
        ("s.csv", "--columns a,b,c --time at_ms --speed x2", ("s",), rows),
        ("n.csv", "--named", ("mic", "tap"), [*rows, rows[0]]),
        ("b.mcap", "--streams /imu --speed max --columns rate.*", ("/imu",), [[1, 10, 100], [2, 20, 200]]),
    ):
        done = client(server, "send", tmp_path / file, *flags.split(), "--output", tmp_path / "y.npz")
        assert done.exit_code == 0, done.stderr
        saved = read_sequences(tmp_path / "y.npz")
        assert (saved.names, saved.frames.tolist()) == (names, frames)
    for file, flags, named in (("s.csv", "--columns a,d", "'d'"), ("b.mcap", "--streams /imu", "--columns")):
        failed = client(server, "send", tmp_path / file, *flags.split())
        assert (failed.exit_code, named in failed.stderr) == (2, True)


def test_names_of_outputs_are_names_of_columns(tmp_path: Path, format: Format) -> None:
    """A model may name its outputs; names that would be ambiguous are not used."""
    for given in (("speech", "noise, loud"), ("speech", "seq"), ("x1", "noise"), ("speech",), ()):
        names = given if given[1:] == ("noise, loud",) else ("y0", "y1")
        assert output_columns(SimpleNamespace(output_names=given), 2) == names
    path = tmp_path / f"n.{format}"
    header = TableHeader(("x0",), ("speech", "noise, loud"))
    x, y = np.array([[1], [2]], np.float32), np.array([[3, -np.inf], [np.nan, np.nan]], np.float32)
    labels = (np.array(["a", "a"], np.object_), np.array([1, 1]), np.array([0, 1], np.uint64), np.array([5, 6]))
    with written_table(path, header) as writer:
        writer.write(TableRows(*labels, x, y))
    read = read_sequences(path)
    assert read.outputs is not None
    assert read.answered is not None
    assert read.times_ns is not None
    assert (read.frames.tolist(), read.outputs[0].tolist()) == ([[1], [2]], [3, -np.inf])
    assert (read.answered.tolist(), read.times_ns.tolist()) == ([True, False], [5, 6])


def test_a_file_without_rows(tmp_path: Path, format: Format) -> None:
    with written_table(tmp_path / f"n.{format}", TableHeader(("x0",), ("y0",))):
        pass
    with pytest.raises(BadFile, match=r"holds no frames|has no messages"):
        read_sequences(tmp_path / f"n.{format}")


def test_a_damaged_file_is_read_or_refused_with_a_sentence(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format
) -> None:
    record(tmp_path / "r.instep", rng, with_states=True)
    client(server, "send", tmp_path / "r.instep", "--speed", "max", "--output", tmp_path / f"e.{format}")
    whole = (tmp_path / f"e.{format}").read_bytes()
    said: list[str] = []
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None])
        try:
            read_sequences(tmp_path / "damaged")
        except CommandProblem as problem:
            said.append(str(problem))
    assert len(said) > 30
    assert [sentence for sentence in said if "\n" in sentence] == []
