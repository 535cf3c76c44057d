from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instep_tools.formats.read import read_sequences
from instep_tools.problems import BadFile
from tests.support.written import NAMES, bits, write_recording


def test_streams_of_a_recording_that_is_being_written(tmp_path: Path) -> None:
    written = write_recording(tmp_path, unanswered=1, finish=False)
    streams = list(dict.fromkeys(row.stream_id for row in written.rows))  # in the order of their first frames
    rows = [row for stream in streams for row in written.of(stream)]
    read = read_sequences(written.path)
    assert sorted(streams) == [1, 2, 3, 4], "the fifth has no frames"
    assert read.names == tuple(NAMES[stream - 1] for stream in streams)
    assert read.lengths.tolist() == [len(written.of(stream)) for stream in streams]
    assert bits(read.frames) == bits([row.x for row in rows])
    assert read.outputs is not None
    assert read.answered is not None
    assert read.times_ns is not None
    assert bits(read.outputs) == bits([row.y for row in rows])
    assert read.answered.tolist() == [not np.isnan(row.y).all() for row in rows]
    assert read.times_ns.tolist() == [row.time_ns for row in rows]


def test_damage_is_found(tmp_path: Path) -> None:
    path = write_recording(tmp_path).path
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("UPDATE batches SET x = zeroblob(length(x))")
    database.close()
    with pytest.raises(BadFile, match="row at position"):
        read_sequences(path)


def test_nothing_is_needed_but_what_the_client_library_needs(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "sys.modules.update(dict.fromkeys(('torch', 'numba', 'pydantic', 'structlog', 'typer', 'rich', 'yaml')))\n"
        "from instep_tools.formats.read import read_sequences\n"
        "print(sorted(read_sequences(Path(sys.argv[1])).names))\n"
    )
    command = [sys.executable, "-c", program, str(write_recording(tmp_path).path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['2', 'a \"b\", ü c', 'mic-1', 'mic-1']\n", "")
