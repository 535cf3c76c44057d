"""Every row measures its sides, whatever the figures are: real servers, very short rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models, rows, watching
from benchmarks.__main__ import SEPARATE
from benchmarks.copied import copied
from benchmarks.durability import server_arguments
from benchmarks.isolation import isolation
from benchmarks.measurement import Bench, Row
from benchmarks.reference import LeftOut
from benchmarks.rows import MEASUREMENTS
from benchmarks.shards import shards
from instep.models.folder import write_model
from tests.support import warm_server
from tests.support.models import with_head
from tests.support.served import WarmServer
from tests.support.threaded import ThreadedServer
from tests.support.warm import WarmProcess

OWN = with_head(3, 20, 6)


POPEN = subprocess.Popen


def begin_warm(command: Sequence[str], *, stdout: int | None = None, **options: Any) -> Any:
    """As `subprocess.Popen`, and quick to start for a module of Python."""
    python, option, module, *arguments = command
    if (python, option) != (sys.executable, "-m") or module == warm_server.__name__:
        return POPEN(command, stdout=stdout, **options)
    output = Path(os.devnull) if stdout == subprocess.DEVNULL else None
    return WarmProcess(arguments, program=module, output=output)


@pytest.mark.parametrize("measure", {**MEASUREMENTS, **SEPARATE}.values(), ids=lambda measure: measure.__name__)
def test_a_measurement_has_a_positive_value_for_each_side(
    measure: Callable[[Bench], list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    for module in (models, watching):
        monkeypatch.setattr(module, "ChildServer", WarmServer)
    if measure in (isolation, models.fairness, shards, copied):
        monkeypatch.setattr(subprocess, "Popen", begin_warm)
    warm_up = int(measure in MEASUREMENTS.values())  # the others begin many processes in each round
    bench = Bench(tmp_path, rounds=1, seconds=0.02, scale=100, warm_up=warm_up, serve=ThreadedServer)
    for row in measure(bench):
        assert row.value > 0
        for values in row.samples.values():
            assert len(values) == 1
            assert min(values) > 0


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=lambda measure: measure.__name__)
def test_a_users_model_is_measured_or_left_out_with_a_reason(
    measure: Callable[[Bench], list[Row]], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    write_model(tmp_path / "own", OWN)
    bench = Bench(tmp_path, rounds=1, seconds=0.02, scale=100, warm_up=0, model=tmp_path / "own", serve=ThreadedServer)
    if measure in (rows.blocks_2x256, rows.blocks_lstm, rows.blocks_module):
        with pytest.raises(LeftOut, match="with another network of the benchmark's own"):
            measure(bench)
        return
    for row in measure(bench):
        assert row.value > 0
        assert row.model == f"{OWN.name}: {OWN.description.in_words()}"


def test_a_users_model_that_is_too_large_for_many_streams_is_left_out(tmp_path: Path) -> None:
    write_model(tmp_path / "own", OWN)
    with pytest.raises(LeftOut, match=r"buffers of 100,096 streams take \d\.\d GB"):
        rows.many_open(Bench(tmp_path, model=tmp_path / "own", serve=ThreadedServer), most_bytes=1_000_000)


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
            *("--set", f"recording.durability={level}"),
        ]
