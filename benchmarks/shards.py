"""Two shards against one server, under the same two producers: `instep serve --shards`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Final

from benchmarks.connection import BareConnection, NotServed
from benchmarks.load import ClosedLoopStreams, Inputs, all_in_flight
from benchmarks.measurement import Bench, Row, Samples, compared, cpu_s, interleave
from benchmarks.reference import BenchmarkModel, check_and_close
from benchmarks.rows import TIMESTEPS
from instep import interrupts
from instep.cluster.shards import run as run_shards
from instep.config import Config
from instep.server import assembly
from instep.server.serve import run as run_server
from instep_client.protocol.wire import shard_of

SHARDS: Final = 2
"""Shards, and producers, each of which has the streams of one shard."""
STREAMS, WIDTH, STEPS = 128, 64, 8
"""Of a producer: streams that send single frames; and of a block, its streams and timesteps."""
BLOCKS: Final = 8
"""The blocks of a producer, all of them in flight."""
ONE, TWO, IN_LOOPS = "1 server", "2 shards", "2 shards that step in their loops"


def shards(bench: Bench) -> list[Row]:
    """Single frames and blocks: frames/s, and frames for each CPU-second of the servers."""
    model = BenchmarkModel.of(bench, "shards")
    x = model.inputs(TIMESTEPS, BLOCKS * WIDTH)
    blocks = [Inputs.of(x[:, at : at + WIDTH].copy(), STEPS) for at in range(0, BLOCKS * WIDTH, WIDTH)]
    rows = []
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Servers(model.folder, name)) for name in (ONE, TWO, IN_LOOPS)}
        for load, inputs, at_least in (
            ("frames", model.lone_inputs(TIMESTEPS, bench.scaled(STREAMS, 4)), 1.2),
            ("blocks", blocks, 1.3),
        ):
            rows += _compare(bench, model, servers, load, inputs, at_least)
    return rows


def _compare(
    bench: Bench,
    model: BenchmarkModel,
    servers: dict[str, Servers],
    load: str,
    inputs: Sequence[Inputs],
    at_least: float,
) -> list[Row]:
    for_cpu: Samples = {f"{name}, frames/CPU-s": [] for name in servers}

    def measure(name: str) -> float:
        rate, frames_for_cpu = _produce(model, servers[name], inputs, bench.seconds)
        for_cpu[f"{name}, frames/CPU-s"].append(frames_for_cpu)
        return rate

    rates = interleave(bench, {f"{name}, frames/s": partial(measure, name) for name in servers})
    counted = {name: values[-bench.rounds :] for name, values in for_cpu.items()}  # without the warm-up
    rows = []
    for unit, end, samples, least in (("frames/s", "", rates, at_least), ("frames/CPU-s", "-cpu", counted, 0.9)):
        for name, middle, threshold in ((TWO, "", least), (IN_LOOPS, "-in-loops", None)):
            what = f"{load}, {unit}, {name} over {ONE}"
            sides = f"{name}, {unit}", f"{ONE}, {unit}"
            row = f"shards-{load}{middle}{end}"
            rows.append(compared(row, what, model.description, samples, *sides, threshold))
    return rows


# ── Producers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _produce(model: BenchmarkModel, servers: Servers, inputs: Sequence[Inputs], seconds: float) -> tuple[float, float]:
    """Run the producers, all at once; the frames per second of all, and for each CPU-second of the servers."""
    processes, results = get_context("fork"), []
    barrier = processes.Barrier(SHARDS + 1, timeout=60)
    for number in range(SHARDS):
        receiver, sender = processes.Pipe(duplex=False)
        endpoint = servers.endpoints[number % len(servers.endpoints)]
        arguments = number, endpoint, model, inputs, seconds, barrier, sender
        processes.Process(target=_producer, args=arguments, daemon=True).start()
        sender.close()
        results.append(receiver)
    try:
        barrier.wait()
        before_s = servers.cpu_s()
        barrier.wait()
        used_s = servers.cpu_s() - before_s
        found = [receiver.recv() for receiver in results]
    except (BrokenBarrierError, EOFError):
        raise NotServed("a producer failed: its traceback is above") from None
    return sum(rate for rate, _ in found), sum(frames for _, frames in found) / max(used_s, 0.01)


def _producer(
    number: int,
    endpoint: str,
    model: BenchmarkModel,
    inputs: Sequence[Inputs],
    seconds: float,
    barrier: Barrier,
    results: Connection,
) -> None:
    names = (name for name in map(str, count()) if shard_of(name, SHARDS) == number)
    width = max(each.steps * each.x.shape[1] for each in inputs)
    with BareConnection(endpoint, width * model.output_bytes) as connection:
        connection.hello()
        groups = [
            ClosedLoopStreams(group, connection.open(list(islice(names, own.x.shape[1]))), own)
            for group, own in enumerate(inputs)
        ]
        barrier.wait()
        rate = all_in_flight(seconds)(connection, groups)
        frames = sum(group.answered * group.frames for group in groups)
        barrier.wait()  # what is checked costs the other nothing
        check_and_close(connection, groups, model.truth)
    results.send((rate, frames))


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Servers:
    """One server or several under one command, in processes of their own while the block runs."""

    def __init__(self, folder: Path, name: str) -> None:
        count, in_loops = 1 if name == ONE else SHARDS, name == IN_LOOPS
        port = free_ports(count)
        self.endpoints = [f"tcp://127.0.0.1:{port + number}" for number in range(count)]
        self._command = [*("-m", "benchmarks.shards"), str(folder), self.endpoints[0], str(count), str(int(in_loops))]

    def __enter__(self) -> Servers:
        self._process = subprocess.Popen([sys.executable, *self._command], stdout=subprocess.DEVNULL)
        for endpoint in self.endpoints:
            with BareConnection(endpoint) as connection:
                connection.hello()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def cpu_s(self) -> float:
        """The CPU time of all of them so far, with that of processes that step."""
        return cpu_s(self._process.pid)


def free_ports(count: int) -> int:
    """The first of some free ports in a row."""
    while True:
        with ExitStack() as stack, suppress(OSError):
            first = int(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
            for port in range(first + 1, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def serve(folder: str, endpoint: str, count: int, in_loops: bool) -> int:
    """Serve until SIGTERM."""
    sections = {"model": {"folder": folder}, "transport": {"endpoint": endpoint}, "http": {"endpoint": "off"}}
    config = Config.model_validate({**sections, "engine": {"device": "cpu"}, "log": {"level": "error"}})
    if count == 1:
        return run_server(config)
    if in_loops:
        setattr(assembly, "steps_in_process", lambda device: False)  # noqa: B010 - there is no setting for it
    return run_shards(config, count, reread=lambda: config)


if __name__ == "__main__":
    interrupts.end_at_once()
    sys.exit(serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"))
