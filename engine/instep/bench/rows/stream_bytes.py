"""What an open stream costs beside its state and its frames, counted allocation by allocation in this process.

The count is the same in every run to some hundredths of a byte, but most of it is the sizes of Python's own objects
(strings, numbers, the table of a dict), which belong to a version of CPython.
"""

from __future__ import annotations

import asyncio
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any, Final

import structlog
import torch

from instep.bench.result import Row
from instep.bench.rounds import Run
from instep.config import Config
from instep.models.certify import Certification, candidate_buckets
from instep.models.description import GruLayers, NetworkDescription
from instep.models.folder import Model, make_model
from instep.models.network import Network
from instep.server.assembly import make_server
from instep.server.preparation import Prepared
from instep.server.server import Server

STREAMS: Final = 44_000
"""With so many, what finds streams by name is at its largest for each: it has just doubled."""
_FEW, _ROWS = 1_000, 512
MOST_BYTES: Final = 200
MEMORY, BOUND = "states in memory, bytes", "with a bound of states in memory, bytes"


def stream_bytes(run: Run) -> list[Row]:
    """Row `stream-bytes`: the larger of the counts without and with `engine.host_streams`."""
    counted = {}
    for name, has_bound in ((MEMORY, False), (BOUND, True)):
        with tempfile.TemporaryDirectory(dir=run.folder) as folder:
            counted[name] = bytes_a_stream(Path(folder), has_bound)
        run.advance()
    return [
        Row(
            name="stream-bytes",
            what="memory of an open stream beside its state and its ring",
            unit="bytes",
            value=max(counted.values()),
            bar=MOST_BYTES,
            direction="at most",
            samples={name: [value] for name, value in counted.items()},
            details={"streams": STREAMS},
        )
    ]


def bytes_a_stream(folder: Path, has_bound: bool) -> float:
    """Bytes that a stream more takes, without its ring and its state, from 1,000 to `STREAMS` of them.

    Args:
        folder: empty; recordings are written there.
        has_bound: whether host memory holds a few states only, and the recording all.
    """
    description = NetworkDescription(features=5, gru=GruLayers(hidden_size=8))
    model = make_model(description, init="random", seed=7, name="small")

    async def grown() -> float:
        await _allocated(model, folder / "first.instep", _FEW, has_bound)  # what is made once is made
        tracemalloc.start()
        try:
            few = await _allocated(model, folder / "few.instep", _FEW, has_bound)
            many = await _allocated(model, folder / "many.instep", STREAMS, has_bound)
        finally:
            tracemalloc.stop()
        return (many - few) / (STREAMS - _FEW)

    return asyncio.run(grown())


async def _allocated(model: Model, file: Path, streams: int, has_bound: bool) -> int:
    """What a server allocates whose streams are all open, without their rings and their states in host memory."""
    engine: dict[str, Any] = {"device": "cpu", "max_streams": streams, "device_streams": _ROWS}
    recording: dict[str, Any] = {}
    if has_bound:
        engine["host_streams"] = _ROWS
        recording["file"] = file
    config = Config.model_validate(
        {
            "transport": {"endpoint": "tcp://127.0.0.1:*"},
            "engine": engine,
            "recording": recording,
            "limits": {"window_frames": 1},
        }
    )
    network = Network(model, torch.device("cpu"))
    buckets = candidate_buckets(network, config.engine.max_batch_size)
    certification = Certification("off", buckets, max_ulp=0, whole_sequence=False)
    prepared = Prepared(model, Path("model"), network, network.device, certification)
    before = tracemalloc.get_traced_memory()[0]
    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(structlog.ReturnLogger(), [lambda *_: ""])
    server = make_server(config, prepared, log)
    serving = asyncio.create_task(server.serve())
    names = [f"stream-{number:06}" for number in range(streams)]
    slots, codes = server.engine.table.open(names, 0, 0)
    assert not codes.any()
    del names, slots, codes
    allocated = tracemalloc.get_traced_memory()[0] - before - _beside(server, network, streams, has_bound)
    server.stop(drain=False)
    await serving
    return allocated


def _beside(server: Server, network: Network, streams: int, has_bound: bool) -> int:
    """Bytes of rings, and of states in host memory where it holds all."""
    rings = server.engine.rings
    state_bytes = 0 if has_bound else (streams + 1) * network.state_layers * network.state_width * 4
    return rings.x.nbytes + rings.y.nbytes + rings.block.nbytes + state_bytes
