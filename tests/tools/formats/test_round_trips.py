"""What one command writes another one reads: each command is run as users run it, and its output read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from instep.cli import app as engine_app
from instep.recording.schema import RESET_EVENT
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import F32
from instep_tools.app import app
from instep_tools.formats.columns import Choice, output_columns
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


@dataclass
class Recorded:
    path: Path
    x: dict[int, F32]
    y: dict[int, F32]

    @property
    def frames(self) -> int:
        return sum(map(len, self.x.values()))


def record(path: Path, rng: np.random.Generator, *, with_states: bool) -> Recorded:
    """Three openings of two names, as the fake server would have answered them.

    With states, the second opening begins in a state of its own, and the third is reset twice on its way.
    """
    x = {stream: rng.integers(-5, 6, (6 + stream, 3)).astype(np.float32) for stream in (1, 2, 3)}
    state = np.full(INFO.state.leaves[0].shape, 3, np.float32)
    starts: dict[int, list[tuple[int, F32 | None]]]
    starts = {2: [(0, state)], 3: [(0, None), (2, state), (5, None)]} if with_states else {}
    y = {}
    for stream, frames in x.items():
        cuts = [*starts.get(stream, [(0, None)]), (len(frames), None)]
        parts = [reference(frames[a:b], begins)[0] for (a, begins), (b, _) in pairwise(cuts)]
        y[stream] = np.concatenate(parts)
    header = make_header(DESCRIPTION, state=INFO.state.encode(), model_fingerprint=INFO.fingerprint)
    writer = RecordingWriter.create(path, header)
    for stream, name in ((1, "mic"), (3, "tap, 2")):
        open_stream(writer, stream, name, stream, 0, START_NS, None)
    steps = [*([3, 1] for _ in x[1]), *([3] for _ in x[3][len(x[1]) :]), *([2] for _ in x[2])]
    done = dict.fromkeys(x, 0)
    for number, streams in enumerate(steps, 1):
        now_ns = START_NS + number * STEP_NS
        if streams == [2] and not done[2]:
            close_stream(writer, 1, now_ns, "closed", done[1], None)
            open_stream(writer, 2, "mic", 2, 0, now_ns, state if with_states else None)
        for seq, begins in starts.get(3, [])[1:] if streams[0] == 3 else []:
            if seq == done[3]:
                stream_event(writer, now_ns, RESET_EVENT, 3, seq, "", begins)
        seqs = [done[stream] for stream in streams]
        inputs, outputs = (
            np.stack([of[stream][seq] for stream, seq in zip(streams, seqs, strict=True)]) for of in (x, y)
        )
        batch = writer.add_inputs(now_ns, np.array(streams, np.uint32), np.array(seqs, np.uint64), inputs)
        writer.add_outputs(now_ns, batch, outputs)
        for stream in streams:
            done[stream] += 1
    writer.close()
    return Recorded(path, x, y)


def export(*arguments: str | Path) -> str:
    result = CliRunner().invoke(engine_app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def client(server: FakeServer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--endpoint", server.endpoint])


@pytest.mark.parametrize("with_states", [False, True])
def test_an_export_is_replayed_and_checked(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format, with_states: bool
) -> None:
    recorded = record(tmp_path / "r.instep", rng, with_states=with_states)
    path = tmp_path / f"e.{format}"
    said = export(recorded.path, "--output", path)
    has_no_states = format == "csv" and with_states
    assert ("CSV does not hold the states that 2 streams began with" in said.replace("\n", " ")) == has_no_states
    checked = client(server, "replay", path, "--check", "--speed", "max", "--save", tmp_path / f"again.{format}")
    if has_no_states:
        assert checked.exit_code == 1
        return
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert f"all {recorded.frames} equal those in the file, bit for bit" in checked.stdout
    again = client(server, "replay", tmp_path / f"again.{format}", "--check", "--speed", "max")
    assert (again.exit_code, again.stderr) == (0, "")
    assert f"all {recorded.frames} equal those in the file, bit for bit" in again.stdout


def test_an_export_keeps_frames_times_and_a_changed_bit(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format
) -> None:
    recorded = record(tmp_path / "r.instep", rng, with_states=False)
    export(recorded.path, "--output", tmp_path / f"e.{format}", "--stream", "tap, 2")
    read = read_sequences(tmp_path / f"e.{format}")
    assert (read.names, read.fingerprint) == (("tap, 2",), None if format == "csv" else INFO.fingerprint)
    np.testing.assert_array_equal(read.frames, recorded.x[3])
    assert read.times_ns is not None
    assert read.times_ns.tolist() == [START_NS + number * STEP_NS for number in range(1, 10)]
    replayed = client(server, "replay", tmp_path / f"e.{format}", "--rate", "1000", "--check")
    assert replayed.exit_code == 0
    server.rules.names.clear()
    recorded.y[3][4, 1] += 1
    other = tmp_path / "other"
    other.mkdir()
    forged = RecordingWriter.create(other / "r.instep", make_header(DESCRIPTION, state=INFO.state.encode()))
    open_stream(forged, 1, "tap", 1, 0, START_NS, None)
    for seq, (x, y) in enumerate(zip(recorded.x[3], recorded.y[3], strict=True)):
        batch = forged.add_inputs(START_NS, np.array([1], np.uint32), np.array([seq], np.uint64), x[None])
        forged.add_outputs(START_NS, batch, y[None])
    forged.close()
    export(other / "r.instep", "--output", other / f"e.{format}")
    differs = client(server, "replay", other / f"e.{format}", "--check")
    if format == "csv":  # it does not know its model
        assert differs.exit_code == 1
        assert "first difference: stream 'tap', frame 4, element 1: recorded " in differs.stdout
    else:
        assert differs.exit_code == 2
        assert "was recorded with 'test', another model than 'halving'" in differs.stderr


def test_what_produce_saves_is_replayed_and_what_it_prints_is_produced(
    tmp_path: Path, server: FakeServer, rng: np.random.Generator, format: Format
) -> None:
    x = rng.integers(-5, 6, (12, 3)).astype(np.float32)
    lines = "".join(f"mic-{row % 2} {' '.join(map(str, frame))}\n" for row, frame in enumerate(x))
    (tmp_path / "in.txt").write_text(lines)
    for flags in ([], ["--only", "mic-1"]):
        path = tmp_path / f"p{len(flags)}.{format}"
        produced = client(server, "produce", tmp_path / "in.txt", "--named", "--save", path, *flags)
        assert produced.exit_code == 0, produced.stderr
        saved = read_sequences(path)
        assert saved.times_ns is None
        assert set(saved.names) == ({"mic-1"} if flags else {"mic-0", "mic-1"})
        assert saved.outputs is not None
        for name, start, length in zip(saved.names, saved.starts, saved.lengths, strict=True):
            expected = reference(x[int(name[-1]) :: 2])[0]
            np.testing.assert_array_equal(saved.outputs[start : start + length], expected)
        checked = client(server, "replay", path, "--check")
        assert (checked.exit_code, checked.stderr) == (0, "")
    for flags in (["--columns", "x*"], []):
        again = client(server, "produce", path, "--format", "jsonl", *flags)
        assert again.exit_code == 0, again.stderr
        (tmp_path / "y.jsonl").write_text(again.stdout)
        rows = [json.loads(line) for line in again.stdout.splitlines()]
        assert [row["y"] for row in rows] == reference(x[1::2])[0].tolist()
        checked = client(server, "replay", tmp_path / "y.jsonl", "--check")
        assert (checked.exit_code, checked.stderr) == (0, "")


def test_columns_by_name_and_names_in_the_first_column(tmp_path: Path, server: FakeServer) -> None:
    (tmp_path / "s.csv").write_text("at_ms,label,c,a,b\n0,up,3,1,2\n20,down,6,4,5\n")
    (tmp_path / "n.csv").write_text("mic,1,2,3\nmic,4,5,6\ntap,1,2,3\n")
    flags = ["--columns", "a,b,c", "--time", "at_ms", "--speed", "x2"]
    for command in ("replay", "produce"):
        done = client(server, command, tmp_path / "s.csv", *flags, "--save", tmp_path / "s.npz")
        assert done.exit_code == 0, done.stderr
        saved = read_sequences(tmp_path / "s.npz")
        assert saved.frames.tolist() == [[1, 2, 3], [4, 5, 6]]
        done = client(server, command, tmp_path / "n.csv", "--named", "--save", tmp_path / "n.npz")
        assert done.exit_code == 0, done.stderr
        assert read_sequences(tmp_path / "n.npz").names == ("mic", "tap")
        failed = client(server, command, tmp_path / "s.csv", "--columns", "a,d")
        assert (failed.exit_code, "'d'" in failed.stderr) == (2, True)


def test_a_topic_of_a_bag_is_replayed(tmp_path: Path, server: FakeServer) -> None:
    write_ros2(tmp_path / "bag.mcap")
    for command in ("replay", "produce"):
        flags = ["--only", "/imu", "--speed", "max"]
        done = client(
            server, command, tmp_path / "bag.mcap", *flags, "--columns", "rate.*", "--save", tmp_path / "y.csv"
        )
        assert done.exit_code == 0, done.stderr
        saved = read_sequences(tmp_path / "y.csv")
        assert (saved.names, saved.frames.tolist()) == (("/imu",), [[1, 10, 100], [2, 20, 200]])
        wide = client(server, command, tmp_path / "bag.mcap", *flags)
        assert (wide.exit_code, "--columns" in wide.stderr) == (2, True)


def test_names_of_outputs_are_names_of_columns(tmp_path: Path, format: Format) -> None:
    """A model may name its outputs; names that would be ambiguous are not used."""
    for given, names in (
        (("speech", "noise, loud"), ("speech", "noise, loud")),
        (("speech", "seq"), ("y0", "y1")),
        (("x1", "noise"), ("y0", "y1")),
        (("speech",), ("y0", "y1")),
        ((), ("y0", "y1")),
    ):
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
    assert (read.frames.tolist(), read.outputs[:1].tolist(), read.answered.tolist()) == (
        [[1], [2]],
        [[3, -np.inf]],
        [True, False],
    )
    assert read.times_ns.tolist() == [5, 6]
    with pytest.raises(BadFile, match=r"not (a )?finite"):
        read_sequences(path, Choice(columns=("speech" if format in ("csv", "parquet") else "y0",)))


def test_a_file_without_rows(tmp_path: Path, format: Format) -> None:
    path = tmp_path / f"n.{format}"
    with written_table(path, TableHeader(("x0",), ("y0",))):
        pass
    with pytest.raises(BadFile, match=r"holds no frames|has no messages"):
        read_sequences(path)


def test_a_damaged_file_is_read_or_refused_with_a_sentence(
    tmp_path: Path, rng: np.random.Generator, format: Format
) -> None:
    export(record(tmp_path / "r.instep", rng, with_states=True).path, "--output", tmp_path / f"e.{format}")
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
