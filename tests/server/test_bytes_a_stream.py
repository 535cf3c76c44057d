"""What a stream costs beside its state and its frames, counted allocation by allocation.

The count is the same in every run to some hundredths of a byte, but most of it is the sizes of Python's own objects
(strings, numbers, the table of a dict), which belong to a version of CPython.
"""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from instep.server.server import Server
from tests.support.models import SMALL
from tests.support.running import prepared, running

STREAMS, FEW, ROWS = 44_000, 1_000, 256
"""With so many streams, what finds them by name is at its largest for each: it has just doubled."""
MOST_BYTES = 200
MEASURED_ON = ((3, 11),)
"""The versions of CPython for which the number was measured: 189, and 193 with a bound of states in host memory."""


async def bytes_of(tmp_path: Path, streams: int, has_bound: bool) -> int:
    """What a server allocates whose streams are all open, without their rings and their states in host memory."""
    engine: dict[str, Any] = {"max_streams": streams, "device_streams": ROWS}
    recording: dict[str, Any] = {}
    if has_bound:
        engine["host_streams"] = ROWS
        recording["file"] = tmp_path / f"{streams}.instep"
    before = tracemalloc.get_traced_memory()[0]
    async with running(SMALL, engine=engine, recording=recording, limits={"window_frames": 1}) as server:
        names = [f"stream-{number:06}" for number in range(streams)]
        slots, codes = server.engine.table.open(names, 0, 0)
        assert not codes.any()
        del names, slots, codes
        allocated = tracemalloc.get_traced_memory()[0] - before - beside(server, streams, has_bound)
        server.stop(drain=False)
    return allocated


def beside(server: Server, streams: int, has_bound: bool) -> int:
    """Bytes of rings, and of states in host memory where it holds all."""
    rings, network = server.engine.rings, prepared(SMALL).network
    state_bytes = 0 if has_bound else (streams + 1) * network.state_layers * network.state_width * 4
    return rings.x.nbytes + rings.y.nbytes + rings.block.nbytes + state_bytes


@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.version_info[:2] not in MEASURED_ON,
    reason="the bytes are those of CPython 3.11's objects; measure on this version, and add it to MEASURED_ON",
)
@pytest.mark.parametrize("has_bound", [False, True])
async def test_a_stream_costs_at_most_two_hundred_bytes(tmp_path: Path, has_bound: bool) -> None:
    async with running(SMALL):
        pass  # what is made once is made
    tracemalloc.start()
    try:
        few, many = [await bytes_of(tmp_path, streams, has_bound) for streams in (FEW, STREAMS)]
    finally:
        tracemalloc.stop()
    assert (many - few) / (STREAMS - FEW) <= MOST_BYTES
