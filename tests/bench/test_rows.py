"""Every row measures what it says, whatever the numbers are: real servers, very short rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from instep.bench.connection import Connection
from instep.bench.lanes import Lane
from instep.bench.reference import check_and_close
from instep.bench.rounds import Run
from instep.bench.rows import chunks, many_open
from instep.bench.suite import MEASUREMENTS, Measurement
from tests.support.threaded import ThreadedServer

MODULES = ("pair", "rows.blocks", "rows.many_open", "rows.exact_off", "rows.chunks", "rows.verification", "rows.start")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for module in MODULES:
        monkeypatch.setattr(f"instep.bench.{module}.ChildServer", ThreadedServer)


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda measurement: measurement.rows[0])
def test_a_row_measures_each_of_its_ways_in_every_round(measurement: Measurement, tmp_path: Path) -> None:
    advanced: list[None] = []
    run = Run(tmp_path, rounds=2, seconds=0.02, scale=100, advance=lambda: advanced.append(None))
    rows = measurement.measure(run)
    assert tuple(row.name for row in rows) == measurement.rows
    for row in rows:
        assert row.value > 0
        for values in row.samples.values():
            assert len(values) == 2
            assert min(values) > 0
    assert len(advanced) == 3


def test_many_are_open_on_one_side_and_few_on_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def check(connection: Connection, lanes: Sequence[Lane], gru: torch.nn.GRU) -> None:
        checked.append(sum(len(lane.handles) for lane in lanes))
        assert min(lane.answered for lane in lanes) >= many_open.WINDOW_FRAMES
        check_and_close(connection, lanes, gru)

    monkeypatch.setattr(many_open, "check_and_close", check)
    [row] = many_open.many_open(Run(tmp_path, rounds=1, seconds=0.0, scale=40))
    assert checked == [1024, 2304]
    assert list(row.samples) == ["1,024 open, frames/s", "2,304 open, frames/s"]


def test_recordings_are_of_whole_chunks_and_of_several_lengths() -> None:
    lengths = chunks.lengths_up_to(4096)
    assert lengths.max() == 4096
    assert lengths.min() >= 3072
    assert not (lengths % chunks.CHUNK).any()
    assert len(set(lengths.tolist())) > 8
