"""The measurements, each of which gives one row or more. `benchmarks/README.md` says what each compares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from benchmarks.client_rows import connections_500, tasks_256
from benchmarks.compiled_load import echoed_singly, served_singly
from benchmarks.connection import BareConnection
from benchmarks.echo import Echo
from benchmarks.kinds import lstm, step_module
from benchmarks.load import (
    F64,
    ClosedLoopStreams,
    Drive,
    Inputs,
    all_in_flight,
    closed_loop,
    open_loop,
    open_streams,
    round_trips,
)
from benchmarks.measurement import Bench, Row, Samples, compared, interleave
from benchmarks.reference import (
    BenchmarkModel,
    LeftOut,
    WrongOutput,
    bare_loop,
    check_and_close,
    measured,
    step_times,
    whole,
)
from instep.core.typing import I64
from instep.recording.reader import RecordingReader
from instep.replay.recorded_model import recorded_model
from instep.replay.verifier import verify

STREAMS, BLOCK, TIMESTEPS = 1024, 256, 128
"""The load in blocks: streams, streams in one message, and different inputs, which a longer round repeats."""
SERVED: Final = "served, frames/s"


# ── Blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def block_inputs(model: BenchmarkModel) -> list[Inputs]:
    """The inputs of each block."""
    x = model.inputs(TIMESTEPS, STREAMS)
    return [Inputs.of(x[:, at : at + BLOCK]) for at in range(0, STREAMS, BLOCK)]


def blocks_bare(bench: Bench) -> list[Row]:
    """1,024 streams in blocks of 256, against the network alone and against the seed's way."""
    model = BenchmarkModel.of(bench, "blocks")
    bare, seed = (f"{model.network.name} alone, batch {rows}, frames/s" for rows in (BLOCK, 1))
    single = model.inputs(TIMESTEPS, STREAMS)[:, :1].copy()
    samples = _over_bare(bench, model, {seed: lambda: bare_loop(model.network, single, bench.seconds)})
    what = f"1,024 streams in blocks of 256 over {model.network.name} alone"
    seeds = "the same over stepping one stream at a time"
    return [
        compared("blocks-bare", what, model.description, samples, SERVED, bare, 0.9),
        compared("blocks-seed", seeds, model.description, samples, SERVED, seed, None),
    ]


def blocks_2x256(bench: Bench) -> list[Row]:
    """The same load with a larger network."""
    _refuse_users_model(bench)
    model = BenchmarkModel.of(bench, "blocks-2x256", hidden=256, layers=2)
    return _other_blocks(bench, "blocks-2x256", "the same load with 2 layers of 256", model, 0.95)


def blocks_lstm(bench: Bench) -> list[Row]:
    """The same load with an LSTM."""
    _refuse_users_model(bench)
    model = lstm(bench)
    return _other_blocks(bench, "blocks-lstm", "the same load with an LSTM, over nn.LSTM alone", model, 0.85)


def blocks_module(bench: Bench) -> list[Row]:
    """The same load with a step module."""
    _refuse_users_model(bench)
    model = step_module(bench)
    what = "the same load with a GRU as an exported step, over the module alone"
    return _other_blocks(bench, "blocks-module", what, model, 0.85)


def _refuse_users_model(bench: Bench) -> None:
    if bench.model is not None:
        raise LeftOut("it is blocks-bare with another network of the benchmark's own")


def _other_blocks(bench: Bench, name: str, what: str, model: BenchmarkModel, at_least: float) -> list[Row]:
    bare = f"{model.network.name} alone, batch {BLOCK}, frames/s"
    samples = _over_bare(bench, model, {})
    return [compared(name, what, model.description, samples, SERVED, bare, at_least)]


def _over_bare(bench: Bench, model: BenchmarkModel, beside: dict[str, Callable[[], float]]) -> Samples:
    """The load in blocks, the network alone, and other sides."""
    inputs = block_inputs(model)
    with bench.serve(model.folder, ["--set", f"engine.max_streams={STREAMS}"]) as server:
        sides = {
            SERVED: lambda: measured(server.endpoint, model, inputs, all_in_flight(bench.seconds)),
            f"{model.network.name} alone, batch {BLOCK}, frames/s": lambda: bare_loop(
                model.network, inputs[0].x, bench.seconds
            ),
        }
        return interleave(bench, sides | beside)


MANY: Final = 100_096
"""100,000 open streams, in whole blocks."""
MOST_BYTES: Final = 2_000_000_000
WINDOW_FRAMES: Final = 4
"""Of the servers with many streams: with the default of 32, the frame buffers of 100,000 streams take 2 GB."""


def many_open(bench: Bench, most_bytes: int = MOST_BYTES) -> list[Row]:
    """The cost of streams that are open: two servers of equal settings, one of which has more of them."""
    model = BenchmarkModel.of(bench, "many-open")
    inputs = block_inputs(model)
    many = bench.scaled(MANY, 2 * STREAMS) // BLOCK * BLOCK
    stream_bytes = model.state.row_bytes + WINDOW_FRAMES * 4 * (model.features + model.truth.outputs)
    if many * stream_bytes > most_bytes:
        raise LeftOut(f"the states and frame buffers of {many:,} streams take {many * stream_bytes / 1e9:.1f} GB")
    settings = ["--set", f"engine.max_streams={many}", "--set", f"limits.window_frames={WINDOW_FRAMES}"]
    with ExitStack() as stack:
        opened: dict[str, tuple[BareConnection, list[ClosedLoopStreams]]] = {}
        for streams in (STREAMS, many):
            server = stack.enter_context(bench.serve(model.folder, settings))
            connection = stack.enter_context(BareConnection(server.endpoint, BLOCK * model.output_bytes))
            connection.hello()
            groups = open_streams(connection, inputs, groups=streams // BLOCK)
            # Fill every frame buffer once: the first write to a page of memory costs more than later ones.
            while min(group.answered for group in groups) < WINDOW_FRAMES:
                closed_loop(connection, groups, len(inputs), bench.seconds)
            opened[f"{streams:,} open, frames/s"] = connection, groups
        sides = {name: partial(closed_loop, *each, len(inputs), bench.seconds) for name, each in opened.items()}
        samples = interleave(bench, sides)
        for connection, groups in opened.values():
            check_and_close(connection, groups, model.truth)
    few_open, all_open = samples
    what = "100,000 streams open over 1,000"
    return [compared("many-open", what, model.description, samples, all_open, few_open, 0.9)]


# ── Single frames, against a bare ZeroMQ echo ────────────────────────────────────────────────────────────────────────


@contextmanager
def engine_and_echo(
    bench: Bench, model: BenchmarkModel, streams: int, drive: Drive
) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """The two sides: the same loop over equal messages, to an engine and to an echo in processes of their own."""
    inputs = model.lone_inputs(TIMESTEPS, streams)
    with bench.serve(model.folder, []) as server, Echo(model.output_bytes) as echo:

        def echo_side() -> float:
            handles = np.arange(1, streams + 1, dtype=np.uint64)
            with BareConnection(echo.endpoint, model.output_bytes) as connection:
                return drive(
                    connection, [ClosedLoopStreams(at, handles[at : at + 1], own) for at, own in enumerate(inputs)]
                )

        yield partial(measured, server.endpoint, model, inputs, drive), echo_side


IN_FLIGHT: Final = ((2, 128, 0.45), (16, 16, 0.45), (256, 1, None))
"""Connections of `single-frames`, the streams of each, and the threshold."""
PER_MESSAGE: Final = "µs of CPU a message"


def single_frames(bench: Bench) -> list[Row]:
    """256 streams in closed loop, one frame in each message, from compiled code; and the CPU of whoever answers."""
    model = BenchmarkModel.of(bench, "single-frames")
    rows = []
    with bench.serve(model.folder, []) as server, Echo(model.output_bytes, compiled=True) as echo:
        for connections, in_flight, at_least in IN_FLIGHT:
            load = model, model.inputs(TIMESTEPS, connections * in_flight), connections, bench.seconds
            sides = {"served": partial(served_singly, server, *load), "echo": partial(echoed_singly, echo, *load)}
            found = interleave(bench, sides)
            samples = {f"{side}, messages/s": [each.rate for each in values] for side, values in found.items()}
            samples |= {f"{side}, {PER_MESSAGE}": [each.cpu_us for each in values] for side, values in found.items()}
            served, echoed, *beside = samples
            name = f"single-frames-{connections}x{in_flight}"
            what = f"{connections} connections with {in_flight} single frames in flight each, over a compiled echo"
            rows.append(compared(name, what, model.description, samples, served, echoed, at_least, beside=beside))
    return rows


def one_stream(bench: Bench) -> list[Row]:
    """One stream that waits for every answer."""
    model = BenchmarkModel.of(bench, "one-stream")
    x = model.inputs(TIMESTEPS, 1)
    with engine_and_echo(bench, model, 1, one_at_a_time(bench.seconds)) as (engine, echo):
        bare = {f"{model.network.name} alone, p50 µs": lambda: p50_us(step_times(model.network, x, bench.seconds))}
        samples = interleave(bench, {"served, p50 µs": engine, "echo, p50 µs": echo, **bare})
    return [one_stream_row(samples, model.description)]


def one_stream_row(samples: Samples, model: str) -> Row:
    """The row of its samples: served, echo and bare step."""
    served, echo, step = (median(values) for values in samples.values())
    what = "one stream in closed loop, p50, over those of a bare ZeroMQ echo and a bare step"
    return Row("one-stream", what, model, "×", served / (echo + step), 1.5, samples, "at most")


PACED_STREAMS, PACED_HZ = 64, 50.0
PACED_LONGER: Final = 2.0
"""Times the length of other rounds: in 3 s there are 9,600 messages, 96 of which are later than the p99."""


def paced(bench: Bench) -> list[Row]:
    """Streams that send at a steady rate, whatever comes back."""
    model = BenchmarkModel.of(bench, "paced")
    with engine_and_echo(bench, model, PACED_STREAMS, steadily(bench.seconds)) as (engine, echo):
        samples = interleave(bench, {"served, p99 ms": engine, "echo, p99 ms": echo})
    return [paced_row(samples, model.description)]


def paced_row(samples: Samples, model: str) -> Row:
    """The row of its samples. Where the echo itself is late, the machine is, and the threshold follows the echo."""
    served_ms, echo_ms = (median(values) for values in samples.values())
    threshold_ms = 2.0 if echo_ms < 0.5 else 4 * echo_ms
    what = "64 streams at 50 Hz, one frame in each message, p99 from when it was due"
    return Row("paced", what, model, "ms", served_ms, threshold_ms, samples, "at most")


def one_at_a_time(seconds: float) -> Drive:
    """The p50, in microseconds, of a stream that waits for every answer."""
    return lambda connection, streams: p50_us(round_trips(connection, streams[0], seconds))


def steadily(seconds: float) -> Drive:
    """The p99, in milliseconds, of streams that send `PACED_HZ` messages a second."""
    return lambda connection, streams: p99_ms(open_loop(connection, streams, PACED_HZ, seconds * PACED_LONGER))


def p50_us(times: F64) -> float:
    """The median of times in seconds, in microseconds."""
    return float(np.median(times)) * 1e6


def p99_ms(times: F64) -> float:
    """The 99th percentile of times in seconds, in milliseconds."""
    return float(np.percentile(times, 99)) * 1e3


# ── Recordings, and the start ────────────────────────────────────────────────────────────────────────────────────────

RECORDINGS, CHUNK = 64, 32
LONGEST: Final = 4096
"""Frames of the longest recording; the shortest has three quarters of them."""
WHOLE: Final = "the padded whole in one call, frames/s"


def chunks(bench: Bench) -> list[Row]:
    """Recordings that are sent in chunks, against one call over all of them."""
    model = BenchmarkModel.of(bench, "chunks")
    longest = bench.scaled(LONGEST // CHUNK, 4) * CHUNK
    lengths = recording_lengths(longest)
    x = model.inputs(longest, RECORDINGS)
    for recording, length in enumerate(lengths.tolist()):
        x[length:, recording] = 0
    inputs = [Inputs.of(x[:length, at : at + 1], CHUNK) for at, length in enumerate(lengths.tolist())]
    frames = int(lengths.sum())
    with bench.serve(model.folder, []) as server:
        sides = {
            SERVED: lambda: measured(server.endpoint, model, inputs, all_in_flight(math.inf), once=True),
            WHOLE: lambda: whole(model.network, x, frames),
        }
        samples = interleave(bench, sides)
    what = "64 recordings in chunks of 32 frames over one call for the whole"
    return [compared("chunks", what, model.description, samples, SERVED, WHOLE, 0.6)]


def recording_lengths(longest: int) -> I64:
    """In frames: whole chunks, one recording of the full length."""
    most = longest // CHUNK
    lengths: I64 = np.random.default_rng(2).integers(most * 3 // 4, most + 1, RECORDINGS)
    lengths[0] = most
    return lengths * CHUNK


def verification(bench: Bench) -> list[Row]:
    """All that `instep verify` does, against one call over the whole."""
    streams, timesteps, verified = 256, bench.scaled(1000, 40), "verified, frames/s"
    model, file = BenchmarkModel.of(bench, "verify"), bench.folder / "verify.instep"
    x = model.inputs(timesteps, streams)
    with bench.serve(model.folder, ["--record", str(file)]) as server:
        measured(server.endpoint, model, [Inputs.of(x)], all_in_flight(math.inf), once=True)
    sides = {verified: lambda: _verify(file), WHOLE: lambda: whole(model.network, x, timesteps * streams)}
    samples = interleave(bench, sides)
    what = "instep verify of 256 streams over one call for the whole"
    return [compared("verify", what, model.description, samples, verified, WHOLE, 0.35)]


def _verify(file: Path) -> float:
    """Frames per second, from opening the file to the report; the start of Python is not included."""
    began = time.perf_counter()
    with RecordingReader(file) as reader:
        report = verify(reader, recorded_model(reader.header, None), [], lambda share: None)
    seconds = time.perf_counter() - began
    if report.verdict != "exact":
        raise (LeftOut if report.verdict == "within tolerance" else WrongOutput)(report.summary())
    return report.frames / seconds


def start(bench: Bench) -> list[Row]:
    """From starting the process until it serves. The warm-up round compiles and caches the kernels."""
    model = BenchmarkModel.of(bench, "start")

    def ready_s() -> float:
        began = time.perf_counter()
        with bench.serve(model.folder, []):
            return time.perf_counter() - began

    samples = interleave(bench, {"ready, s": ready_s})
    what = "instep serve from start to ready, not the first time on this machine"
    return [Row("start", what, model.description, "s", median(samples["ready, s"]), 3.0, samples, "at most")]


MEASUREMENTS: Final[dict[str, Callable[[Bench], list[Row]]]] = {
    "blocks-bare": blocks_bare,
    "blocks-2x256": blocks_2x256,
    "blocks-lstm": blocks_lstm,
    "blocks-module": blocks_module,
    "single-frames": single_frames,
    "one-stream": one_stream,
    "paced": paced,
    "tasks-256": tasks_256,
    "connections-500": connections_500,
    "many-open": many_open,
    "chunks": chunks,
    "verify": verification,
    "start": start,
}
