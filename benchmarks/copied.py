"""The cost of a copy on another node: a shard with one against a server that records without."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.connection import BareConnection, NotServed
from benchmarks.load import ClosedLoopStreams, Inputs, all_in_flight, round_trips
from benchmarks.measurement import Bench, Row, compared, interleave
from benchmarks.reference import BenchmarkModel, measured
from benchmarks.rows import TIMESTEPS, one_at_a_time
from benchmarks.shards import free_ports
from instep.cluster.talk import Caller, NoAnswer

STREAMS, STEPS = 64, 8
LONGEST_MS: Final = 250.0
"""How long an answer may take while a copy begins, whatever the size of the recording."""
_PATIENCE_S: Final = 120.0
_LOOK_S: Final = 0.1
COPIED, ALONE = "with a copy", "without"


def copied(bench: Bench) -> list[Row]:
    """Blocks and single steps: frames/s and the p50 of an answer; and the longest answer while a copy begins."""
    model = BenchmarkModel.of(bench, "copied")
    x = model.inputs(TIMESTEPS, STREAMS)
    rows = []
    with ExitStack() as stack:
        record = ["--record", str(bench.folder / "alone.instep")]
        alone = stack.enter_context(bench.serve(model.folder, record))
        cluster = stack.enter_context(CopiedServer(model.folder, bench.folder))
        endpoints = {COPIED: cluster.endpoint, ALONE: alone.endpoint}
        for load, steps, at_least in (("blocks", STEPS, 0.6), ("steps", 1, 0.8)):
            inputs = [Inputs.of(x, steps)]
            for unit, drive in (("frames/s", all_in_flight(bench.seconds)), ("p50 us", one_at_a_time(bench.seconds))):
                sides: dict[str, Callable[[], float]] = {
                    f"{name}, {unit}": partial(measured, endpoint, model, inputs, drive)
                    for name, endpoint in endpoints.items()
                }
                samples = interleave(bench, sides)
                what = f"64 streams, {steps} timesteps a message, {unit} with a copy over without"
                name, limit = (f"copied-{load}", at_least) if unit == "frames/s" else (f"copied-{load}-p50", 2.0)
                direction: Any = "at least" if unit == "frames/s" else "at most"
                of, over = sides
                rows.append(compared(name, what, model.description, samples, of, over, limit, direction))
        rows.append(_while_it_begins(bench, model, cluster, [Inputs.of(x, STEPS)]))
    return rows


def _while_it_begins(bench: Bench, model: BenchmarkModel, cluster: CopiedServer, inputs: list[Inputs]) -> Row:
    def drive(connection: BareConnection, groups: Sequence[ClosedLoopStreams]) -> float:
        cluster.kill_copy()
        longest_s, until, was_lost = 0.0, time.monotonic() + _PATIENCE_S, False
        while not (was_lost and cluster.has_copy()):  # which is noticed with the next commit
            if time.monotonic() > until:
                raise NotServed(f"no copy has become whole within {_PATIENCE_S:g} s")
            longest_s = max(longest_s, float(round_trips(connection, groups[0], _LOOK_S).max()))
            was_lost = was_lost or not cluster.has_copy()
        return 1e3 * longest_s

    name = "longest ms"
    samples = {name: [measured(cluster.endpoint, model, inputs, drive)]}  # once: by now it copies gigabytes
    what = "the longest answer while a copy begins"
    return Row(
        "copied-begins", what, model.description, "ms", max(samples[name]), LONGEST_MS, samples, direction="at most"
    )


class CopiedServer:
    """A directory and two nodes on this machine, with one shard that has a copy."""

    def __init__(self, model: Path, folder: Path) -> None:
        port = free_ports(5)
        self._directory = f"127.0.0.1:{port}"
        self._store = ["--store", str(folder / "directory"), "--shards", "1", "--endpoint", f"tcp://{self._directory}"]
        self._nodes = {f"n{at}": port + 1 + 2 * at for at in range(2)}
        self._commands = [["directory", *self._store]]
        for name, own in self._nodes.items():
            (folder / name).mkdir()
            place = ["--record", str(folder / name), "--endpoint", f"tcp://127.0.0.1:{own}"]
            settings = ["--set", "http.endpoint=off", "--set", "engine.device=cpu"]
            about = ["--directory", self._directory, "--name", name, *settings]
            self._commands.append(["agent", str(model), *place, *about])
        self._processes: list[subprocess.Popen[bytes]] = []
        self._caller = Caller(f"tcp://{self._directory}")

    def __enter__(self) -> CopiedServer:
        for command in self._commands:
            line = [sys.executable, "-m", "instep", "cluster", *command, "--set", "log.level=error"]
            self._processes.append(subprocess.Popen(line, stdout=subprocess.DEVNULL))
        until = time.monotonic() + _PATIENCE_S
        while not self.has_copy():
            if time.monotonic() > until:
                self.__exit__()
                raise NotServed(f"the cluster has no shard with a copy within {_PATIENCE_S:g} s")
            time.sleep(_LOOK_S)
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait()
        self._caller.close()

    @property
    def endpoint(self) -> str:
        """Where the shard is served."""
        return str(self._shard()["endpoint"])

    def has_copy(self) -> bool:
        """Whether the shard is served, and has a copy that counts."""
        with suppress(NoAnswer):
            shard = self._shard()
            return bool(shard["copy"] and shard["endpoint"])
        return False

    def kill_copy(self) -> None:
        """Kill the process that holds the copy."""
        port = self._nodes[self._shard()["copy"]] + 1
        for agent in self._processes:
            for process in psutil.Process(agent.pid).children(recursive=True):
                if any(each.laddr.port == port and each.status == "LISTEN" for each in process.net_connections("tcp")):
                    process.kill()

    def _shard(self) -> dict[str, Any]:
        (shard,) = self._caller.ask("status", within_s=2.0)["shards"]
        return dict(shard)
