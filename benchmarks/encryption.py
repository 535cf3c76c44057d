"""The cost of encryption: servers with and without keys under the same load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from zmq.auth import create_certificates, load_certificate

from benchmarks.load import Drive, Inputs, all_in_flight
from benchmarks.measurement import Bench, Row, Samples, compared, interleave
from benchmarks.reference import BenchmarkModel, measured
from benchmarks.rows import PACED_STREAMS, STREAMS, TIMESTEPS, block_inputs, steadily
from instep_client.key_files import ClientKeys

LATER_MS: Final = 1.0
"""By how much the p99 of paced streams may grow."""


def encrypted(bench: Bench) -> list[Row]:
    """Single frames, blocks and paced streams, each with and without keys."""
    model = BenchmarkModel.of(bench, "encrypted")
    frame_bytes = 4 * model.features + model.output_bytes
    lone = partial(model.lone_inputs, TIMESTEPS)
    with _servers(bench, model) as sides:
        messages = interleave(bench, sides("messages/s", lone(256), all_in_flight(bench.seconds)))
        blocks = interleave(bench, sides("frames/s", block_inputs(model), all_in_flight(bench.seconds)))
        times = interleave(bench, sides("p99 ms", lone(PACED_STREAMS), steadily(bench.seconds)))
    megabytes = median(blocks["with keys, frames/s"]) * frame_bytes / 1e6
    with_ms, without_ms = (median(values) for values in times.values())
    return [
        _ratio("encrypted-frames", "256 streams, one frame in each message", model, messages, "messages/s", 0.8),
        _ratio("encrypted-blocks", "1,024 streams in blocks of 256", model, blocks, "frames/s", None),
        Row(
            "encrypted-bytes",
            "frames and outputs of those blocks with keys",
            model.description,
            "MB/s",
            megabytes,
            150.0,
            blocks,
            "at least",
        ),
        Row(
            "encrypted-paced",
            "64 streams at 50 Hz, p99 with keys",
            model.description,
            "ms",
            with_ms,
            without_ms + LATER_MS,
            times,
            "at most",
        ),
    ]


def _ratio(name: str, what: str, model: BenchmarkModel, samples: Samples, unit: str, at_least: float | None) -> Row:
    sides = f"with keys, {unit}", f"without, {unit}"
    return compared(name, f"{what}, with keys over without", model.description, samples, *sides, at_least)


Sides = Callable[[str, list[Inputs], Drive], dict[str, Callable[[], float]]]


@contextmanager
def _servers(bench: Bench, model: BenchmarkModel) -> Iterator[Sides]:
    arguments = ["--set", f"engine.max_streams={STREAMS}"]
    with ExitStack() as stack:
        plain = stack.enter_context(bench.serve(model.folder, arguments))
        settings, keys = _make_keys(bench.folder)
        keyed = stack.enter_context(bench.serve(model.folder, [*arguments, *settings]))

        def sides(unit: str, inputs: list[Inputs], drive: Drive) -> dict[str, Callable[[], float]]:
            return {
                f"with keys, {unit}": partial(measured, keyed.endpoint, model, inputs, drive, keys=keys),
                f"without, {unit}": partial(measured, plain.endpoint, model, inputs, drive),
            }

        yield sides


def _make_keys(folder: Path) -> tuple[list[str], ClientKeys]:
    """Keys of a server and of one client; the settings of `instep serve`, and what the client connects with."""
    text = {}
    for name in ("server", "load"):
        _, secret = create_certificates(folder, name)
        Path(secret).chmod(0o600)
        text[name] = [part.decode() for part in load_certificate(secret) if part]
    peers = folder / "peers.yaml"
    peers.write_text(f"load: {{key: '{text['load'][0]}', role: operator}}\n")
    files = {"key_file": folder / "server.key_secret", "peers_file": peers}
    settings = [word for key, file in files.items() for word in ("--set", f"transport.{key}={file}")]
    return settings, (text["server"][0], text["load"][0], text["load"][1])
