"""A recording that is kept: every later version replays it to the same bits, and goes on with it."""

from __future__ import annotations

import io
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from instep.core.tables import rows_of
from instep.core.typing import F32, I64
from instep.models.folder import load_model
from instep.recording.inspection import look_over
from instep.recording.reader import RecordingReader
from instep.recording.schema import FORMAT_VERSION, RecordingHeader
from instep.replay.command import run
from tests.support.batches import batches_of
from tests.support.golden import FEATURES, GOLDEN, HIDDEN, MODEL_FOLDER, by_hand
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.states import floats_of
from tests.support.story import new_parts
from tests.support.stretches import stretches_of

OPEN = {"plain", "given", "fork", "late"}
WINDOW = 32


@dataclass(frozen=True)
class Known:
    """What its client knew of a stream when the recording was made."""

    x: F32
    """float32 [T, features]: the frames that were sent; the last may be unanswered."""
    y: F32
    """float32 [≤ T, outputs]: what was served."""
    first_seq: int
    epoch: int
    starts: F32
    """[resets + 1, 1 + hidden size]: before which frame, state."""

    def by_hand(self) -> F32:
        """Every output, worked out: float32 [T, outputs]."""
        at = [*self.starts[:, 0].astype(int).tolist(), len(self.x)]
        parts = [by_hand(self.x[at[i] : at[i + 1]], self.starts[i, 1:]) for i in range(len(self.starts))]
        return np.concatenate(parts)


@pytest.fixture
def streams() -> dict[str, Known]:
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        names = sorted({key.split("/")[0] for key in file.files})
        return {
            name: Known(
                file[f"{name}/x"],
                file[f"{name}/y"],
                int(file[f"{name}/first_seq"]),
                int(file[f"{name}/epoch"]),
                file[f"{name}/starts"],
            )
            for name in names
        }


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return Path(shutil.copyfile(GOLDEN, tmp_path / "r.instep"))


@pytest.fixture
def header() -> RecordingHeader:
    """Of an engine like the one that wrote it last; the bits do not depend on the machine."""
    with RecordingReader(GOLDEN) as reader:
        return reader.engines[-1].header


def assert_same(one: F32, other: F32, what: str) -> None:
    np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), what)


def test_the_present_format_has_one() -> None:
    with RecordingReader(GOLDEN) as reader:
        assert reader.header.format_version == FORMAT_VERSION


def test_what_was_served_can_be_worked_out_by_hand(streams: dict[str, Known]) -> None:
    assert streams.keys() == OPEN | {"closed"}
    for name, stream in streams.items():
        assert len(stream.x) - len(stream.y) == (name == "late")
        assert_same(stream.by_hand()[: len(stream.y)], stream.y, name)
    assert [len(streams[name].starts) for name in ("plain", "given")] == [2, 2]
    assert streams["late"].first_seq == 100


def test_it_holds_every_kind_of_row() -> None:
    database = sqlite3.connect(f"file:{GOLDEN}?mode=ro&immutable=1", uri=True)
    kinds = {kind for (kind,) in database.execute("SELECT DISTINCT kind FROM events")}
    tables = ("openings", "batches", "outputs", "closings", "states", "checkpoints")
    rows = {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    database.close()
    assert kinds >= {"reset", "owner", "parked", "checkpoint", "recovered", "end"}
    assert min(rows.values()) > 0
    assert rows["batches"] > rows["outputs"]


def test_it_is_read_to_the_very_frames_and_outputs(streams: dict[str, Known]) -> None:
    read: dict[str, list[tuple[F32, F32, int]]] = {name: [] for name in streams}
    for stretch in stretches_of(GOLDEN):
        read[stretch.name].append((stretch.x, stretch.y, stretch.first_seq))
    for name, stream in streams.items():
        x, y, first_seqs = zip(*read[name], strict=True)
        assert_same(np.concatenate(x), stream.x, name)
        assert_same(np.concatenate(y), stream.y, name)
        assert first_seqs == tuple(stream.first_seq + int(at) for at in stream.starts[:, 0])


def test_it_is_verified() -> None:
    found = look_over(GOLDEN)
    assert (found["streams"], found["open_streams"], found["restarts"]) == (5, 4, 2)
    said = io.StringIO()
    console = Console(file=said, width=160)
    assert run([GOLDEN], MODEL_FOLDER, [], console) == 0, said.getvalue()


def test_an_engine_goes_on_with_it_to_the_bit(
    recording: Path, header: RecordingHeader, streams: dict[str, Known]
) -> None:
    engine = new_parts(load_model(MODEL_FOLDER), WINDOW, max_streams=8)
    writer, recovery = engine.resume(recording, header)
    writer.close()
    assert recovery.streams == len(OPEN)
    assert recovery.frames > 0
    assert engine.table.open_count == len(OPEN)
    for name in OPEN:
        stream, slot, table, tables = streams[name], engine.slot(name), engine.table, engine.tables
        y, seq = stream.by_hand(), stream.first_seq + len(stream.x)
        assert (table.next_seq[slot], table.epoch[slot]) == (seq, stream.epoch), name
        (state,) = floats_of(engine.stepper.read(np.array([slot])), HIDDEN)
        assert_same(state, y[-1] if len(y) else stream.starts[-1, 1:], name)
        seqs: I64 = np.arange(table.acked[slot], seq)
        rows = rows_of(tables, np.full(len(seqs), slot), seqs)
        assert_same(tables.x[rows], stream.x[seqs - stream.first_seq], name)
        assert_same(tables.y[rows], y[seqs - stream.first_seq], name)
    with RecordingReader(recording) as reader:
        assert all(batch.y is not None for batch in batches_of(reader))


async def test_its_clients_go_on_with_it(recording: Path, header: RecordingHeader, streams: dict[str, Known]) -> None:
    model = load_model(MODEL_FOLDER)
    assert header.model_fingerprint == model.fingerprint
    names = sorted(OPEN)
    have = [streams[name].first_seq + len(streams[name].y) for name in names]
    async with running(model, recording={"path": recording}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(names, have, [streams[name].epoch for name in names])
        assert resumed.codes() == []
        late = names.index("late")
        again = await client.step(resumed.handles()[[late]], [have[late]], streams["late"].x[None, -1:], [have[late]])
        assert_same(again.floats(), streams["late"].by_hand()[-1], "the frame that was under way")
        x = np.ones((1, len(names), FEATURES), np.float32)
        reply = await client.step(resumed.handles(), resumed.seqs(), x, resumed.seqs())
        assert reply.failures() == []
        for column, name in enumerate(names):
            expected = by_hand(x[:, column], streams[name].by_hand()[-1])
            assert_same(reply.floats().reshape(-1, HIDDEN)[column], expected[0], name)
