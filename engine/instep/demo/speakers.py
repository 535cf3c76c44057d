"""`instep demo`: recorded speech through a trained network, from hundreds of producers to the verifier's line."""

from __future__ import annotations

import asyncio
import io
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from instep.config.sections import HttpConfig
from instep.core.typing import I64, Bool
from instep.demo import MODEL_FOLDER
from instep.demo.child_server import ChildFailed, ChildServer
from instep.demo.picture import draw
from instep.demo.producers import (
    FASTEST_S,
    SLOWEST_S,
    SPEAKERS,
    Heard,
    Producer,
    load_utterances,
    make_producers,
    right_after,
    stream_all,
)
from instep.interrupts import Stopped
from instep.recording.table import OpenedRecording
from instep.replay.command import run as verify
from instep.server.checks import allow_open_files
from instep_client import AsyncClient, InstepError
from instep_tools.terminal import progress

FAILED: Final = 1
AFTER: Final = (1, 2, 3, 5, 7, 10, 15)
"""Numbers of frames after which the table says how many decisions are right."""
_FILES_A_CONNECTION: Final = 2
"""ZeroMQ's socket, and what wakes the event loop for it."""
_OTHER_FILES: Final = 150


def say(console: Console, sentence: str, style: str | None = None) -> None:
    """A line, as it is."""
    console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


def run(out: Path, console: Console, *, speed: float = 1.0, keep: bool = False) -> int:
    """Serve, stream, show, draw, verify.

    Args:
        out: where the recording and the picture go; those of an earlier demo are replaced.
        console: where everything is shown.
        speed: 2 to have every producer send twice as fast.
        keep: whether to stream the same recordings again and again, until a signal, before all of it is verified.

    Returns:
        The verifier's exit status; `FAILED` also where it did not come so far.
    """
    try:
        return _run(out, console, speed, keep)
    except (ChildFailed, InstepError) as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"cannot write into {out}: {error.strerror}; name another folder with --out"
    say(console, sentence, "bold red")
    return FAILED


def _run(out: Path, console: Console, speed: float, keep: bool) -> int:
    recording, picture = out / "speakers.recording", out / "speakers.png"
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-shm"):  # the engine never writes over a recording by itself
        recording.with_name(recording.name + suffix).unlink(missing_ok=True)
    utterances = load_utterances()
    producers = make_producers(utterances.frames, speed)
    heard = Heard(producers, SPEAKERS)
    # Before the engine starts, which inherits the limit of open files.
    files = allow_open_files(len(producers) * _FILES_A_CONNECTION + _OTHER_FILES)
    connections = max(1, min(len(producers), (files - _OTHER_FILES) // _FILES_A_CONNECTION))

    say(console, f"starting the engine with the model in {MODEL_FOLDER}")
    is_streamed = False
    try:
        verified = ["--set", "verify.live=true"] if keep else []  # the dashboard shows it
        with ChildServer(MODEL_FOLDER, ["--record", str(recording), *verified], administered=True) as server:
            said = server.started
            say(console, f"serving at {server.endpoint} on {said['device']}, {said['exactness']}")
            say(console, f"streaming {len(producers)} recordings of nine speakers, {heard.frames:,} frames, from")
            rates = f"{speed / SLOWEST_S:g} to {speed / FASTEST_S:g} frames/s"
            say(console, f"{connections} connections, {rates} each")
            seconds, stats = asyncio.run(_stream(server.endpoint, producers, connections, heard, console))
            is_received = received_is_recorded(recording, producers, heard)
            right = right_after(heard.outputs, utterances.speakers)
            console.print(accuracy_table(right))
            say(console, f"speakers named correctly at the last frame: {right[:, -1].mean():.2%}")
            console.print(speed_table(heard, seconds, stats))
            title = f"{len(producers)} recordings of nine speakers, streamed frame by frame"
            draw(heard, utterances.speakers, picture, title)
            if keep:
                say(console, f"dashboard: {said.get('http', 'none, because another program uses its port')}")
                say(console, f"in a terminal: {program()}-client top {server.endpoint}")
                say(console, "streaming the same recordings again and again; Ctrl-C ends it, and verifies them all")
                is_streamed = True
                while True:
                    asyncio.run(stream_all(server.endpoint, producers, connections, Heard(producers, SPEAKERS)))
    except (Stopped, KeyboardInterrupt):
        if not is_streamed:
            raise

    if not is_received:
        say(console, f"the producers received other outputs than {recording} holds", "bold red")
        return FAILED
    say(console, "the producers received exactly what was recorded, bit for bit")
    say(console, f"picture: {picture}")
    say(console, f"verify the recording again: {program()} verify {shlex.quote(str(recording))}")
    status = show_verification(recording, console)
    if not keep:
        say(console, f"to see it on the dashboard, http://{HttpConfig().endpoint}: {program()} demo --keep")
    return status


async def _stream(
    endpoint: str, producers: Sequence[Producer], connections: int, heard: Heard, console: Console
) -> tuple[float, dict[str, float]]:
    """The seconds it took, and the server's own numbers after it."""

    def finished() -> str:
        return f"{int((heard.answered == heard.lengths).sum())} finished"

    async with progress(console, "streaming", heard.frames, "frames", lambda: int(heard.answered.sum()), finished):
        seconds = await stream_all(endpoint, producers, connections, heard)
    async with AsyncClient(endpoint, "demo") as client:
        return seconds, await client.stats()


def accuracy_table(right: Bool) -> Table:
    """Counts and shares of right decisions after some numbers of frames."""
    recordings, longest = right.shape
    shown = [count for count in AFTER if count < longest]
    table = Table(title=f"correct decisions about {recordings} speakers, by frames heard", box=box.SIMPLE)
    table.add_column("heard")
    for heading in (*map(str, shown), "all"):
        table.add_column(heading, justify="right")
    counts: I64 = right.sum(axis=0)[[*(count - 1 for count in shown), -1]]
    table.add_row("correct", *map(str, counts))
    table.add_row("accuracy", *(f"{count / recordings:.1%}" for count in counts))
    return table


def speed_table(heard: Heard, seconds: float, stats: dict[str, float]) -> Table:
    """Throughput, and latency as the producers saw it."""
    latency_ms = np.percentile(np.concatenate(heard.latency_s) * 1000, (50, 99, 100))
    table = Table(title="latency from when each frame was due, the producers' timers included", box=box.SIMPLE)
    for heading in ("frames", "seconds", "frames/s", "frames/step", "p50 ms", "p99 ms", "slowest ms"):
        table.add_column(heading, justify="right")
    rate, batch = f"{heard.frames / seconds:,.0f}", f"{stats['batch_size_mean']:.1f}"
    table.add_row(f"{heard.frames:,}", f"{seconds:.1f}", rate, batch, *(f"{value:,.1f}" for value in latency_ms))
    return table


def received_is_recorded(recording: Path, producers: Sequence[Producer], heard: Heard) -> bool:
    """Whether the recording holds what every producer sent and received, bit for bit, and nothing else."""
    with OpenedRecording(recording) as opened:
        recorded = {name: (stream.inputs.tobytes(), stream.outputs.tobytes()) for name, stream in opened.items()}
    return recorded == {
        producer.name: (producer.frames.tobytes(), outputs.tobytes())
        for producer, outputs in zip(producers, heard.outputs, strict=True)
    }


def show_verification(recording: Path, console: Console) -> int:
    """Run the verifier; show its last line, or all it says where something is wrong."""
    report = io.StringIO()
    status = verify(recording, model_folder=None, streams=[], json=False, console=Console(file=report, width=100))
    said = report.getvalue().strip()
    say(console, said if status else said.splitlines()[-1], "bold red" if status else "bold green")
    return status


def program() -> str:
    """The word or path that starts this program here; a path when it is not on PATH, as in `make demo`."""
    script, here = Path(sys.executable).with_name("instep"), Path.cwd()
    if shutil.which("instep") or not script.exists():
        return "instep"
    is_below = script.is_relative_to(here) and script.parent != here
    return shlex.quote(str(script.relative_to(here) if is_below else script))
