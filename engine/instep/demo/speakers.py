"""`instep demo`: recorded speech through a trained network, from hundreds of producers to the verifier's line."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from instep.config.sections import HttpConfig
from instep.core.typing import Bool
from instep.demo import MODEL_FOLDER
from instep.demo.child_server import ChildFailed, ChildServer
from instep.demo.picture import draw
from instep.demo.producers import SPEAKERS, Heard, Producer, load_utterances, make_producers, right_after, stream_all
from instep.interrupts import Stopped
from instep.recording.table import OpenedRecording
from instep.replay.command import run as verify
from instep.server.checks import allow_open_files
from instep_client import InstepError
from instep_tools.terminal import progress

FAILED: Final = 1
AFTER: Final = (1, 2, 3, 5, 7, 10, 15)
"""Numbers of frames after which the table says how many decisions are right."""
_FILES_A_CONNECTION: Final = 2
"""The files that a ZeroMQ socket uses, including those that wake the event loop."""
_OTHER_FILES: Final = 150


def say(console: Console, sentence: str, style: str | None = None) -> None:
    """Print a line without markup."""
    console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


def run(out: Path, console: Console, *, speed: float = 1.0, keep: bool = False) -> int:
    """Serve, stream, show, draw and verify.

    Args:
        out: the folder for the recording and the picture, which replace those of an earlier demo.
        console: shows the output.
        speed: 2 makes every producer twice as fast.
        keep: whether to stream the same recordings again and again, until a signal, before all of it is verified.

    Returns:
        The verifier's exit status, or `FAILED` if an earlier part failed.
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
    recording, picture = out / "speakers.instep", out / "speakers.png"
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
            say(console, f"{connections} connections, each at a rate of its own")
            seconds = asyncio.run(_stream(server.endpoint, producers, connections, heard, console))
            is_received = received_is_recorded(recording, producers, heard)
            console.print(accuracy_table(right_after(heard.outputs, utterances.speakers)))
            p50, p99, most = np.percentile(np.concatenate(heard.latency_s) * 1000, (50, 99, 100))
            say(console, f"{heard.frames:,} frames in {seconds:.1f} s; from when each was due to its output:")
            say(console, f"half within {p50:.1f} ms, 99 % within {p99:.1f} ms, all within {most:.1f} ms")
            draw(heard, utterances.speakers, picture, f"{len(producers)} recordings of nine speakers, frame by frame")
            if keep:
                say(console, f"dashboard: {said.get('http', 'none, because another program uses its port')}")
                say(console, f"in a terminal: {program()}-client top -e {server.endpoint}")
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
    if not keep:
        say(console, f"to see it on the dashboard, http://{HttpConfig().endpoint}: {program()} demo --keep")
    say(console, f"verifying the recording, as by: {program()} verify {shlex.quote(str(recording))}")
    return verify([recording], None, [], console)


async def _stream(endpoint: str, producers: list[Producer], connections: int, heard: Heard, console: Console) -> float:
    def finished() -> str:
        return f"{int((heard.answered == heard.lengths).sum())} finished"

    with progress(console, "streaming", heard.frames, "frames", lambda: int(heard.answered.sum()), finished):
        return await stream_all(endpoint, producers, connections, heard)


def accuracy_table(right: Bool) -> Table:
    """The numbers and shares of right decisions after some numbers of frames."""
    recordings, longest = right.shape
    shown = [count for count in AFTER if count < longest]
    table = Table(title=f"correct decisions about {recordings} speakers, by frames heard", box=box.SIMPLE)
    for heading in ("heard", *map(str, shown), "all"):
        table.add_column(heading, justify="left" if heading == "heard" else "right")
    counts = right.sum(axis=0)[[*(count - 1 for count in shown), -1]].tolist()
    table.add_row("correct", *map(str, counts))
    table.add_row("accuracy", *(f"{count / recordings:.1%}" for count in counts))
    return table


def received_is_recorded(recording: Path, producers: list[Producer], heard: Heard) -> bool:
    """Whether the recording contains exactly the frames and outputs of all producers, bit for bit."""
    with OpenedRecording(recording) as opened:
        recorded = {name: (stream.inputs.tobytes(), stream.outputs.tobytes()) for name, stream in opened.items()}
    return recorded == {
        producer.name: (producer.frames.tobytes(), outputs.tobytes())
        for producer, outputs in zip(producers, heard.outputs, strict=True)
    }


def program() -> str:
    """The command that starts this program: its name, or its path if it is not on PATH, as for `make demo`."""
    script = Path(sys.executable).with_name("instep")
    return "instep" if shutil.which("instep") or not script.exists() else shlex.quote(str(script))
