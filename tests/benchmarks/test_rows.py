"""Every row measures its sides, whatever the figures are: real servers, very short rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.__main__ import SEPARATE
from benchmarks.durability import server_arguments
from benchmarks.measurement import Bench, Row
from benchmarks.rows import MEASUREMENTS
from tests.support.threaded import ThreadedServer


@pytest.mark.parametrize("measure", {**MEASUREMENTS, **SEPARATE}.values(), ids=lambda measure: measure.__name__)
def test_a_measurement_has_a_positive_value_for_each_side(
    measure: Callable[[Bench], list[Row]], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    bench = Bench(tmp_path, rounds=1, seconds=0.02, scale=100, serve=ThreadedServer)
    for row in measure(bench):
        assert row.value > 0
        for values in row.samples.values():
            assert len(values) == 1
            assert min(values) > 0


def test_many_streams_are_open_on_one_side_and_few_on_the_other(tmp_path: Path) -> None:
    [row] = rows.many_open(Bench(tmp_path, rounds=1, seconds=0.0, scale=40, serve=ThreadedServer))
    assert set(row.samples) == {"1,024 open, frames/s", "2,304 open, frames/s"}


def test_recordings_consist_of_whole_chunks_and_differ_in_length() -> None:
    lengths = rows.recording_lengths(4096)
    assert lengths.max() == 4096
    assert lengths.min() >= 3072
    assert not (lengths % rows.CHUNK).any()
    assert len(set(lengths.tolist())) > 8


def test_each_server_records_with_its_own_durability(tmp_path: Path) -> None:
    assert "--record" not in server_arguments(tmp_path, None)
    for level in ("memory", "commit", "fsync"):
        assert server_arguments(tmp_path, level)[2:] == [
            *("--record", str(tmp_path / f"{level}.instep")),
            *("--durability", level),
        ]
