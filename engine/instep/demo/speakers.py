"""`instep demo`: recorded speech through a trained network, from hundreds of producers to the verifier's line."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from instep.config.sections import HttpConfig
from instep.core.typing import I32
from instep.demo import MODEL_FOLDER
from instep.demo.child_server import ChildFailed, ChildServer
from instep.demo.picture import draw
from instep.demo.producers import (
    FASTEST_S,
    SLOWEST_S,
    Heard,
    Producer,
    connections_for,
    right_after,
    stream_all,
    timetable,
)
from instep.demo.show import accuracy_table, say, speed_table, streaming
from instep.demo.train import SPEAKERS, Utterances, accuracy, load_utterances
from instep.interrupts import Stopped
from instep.models.folder import load_model
from instep.recording.reader import RecordingReader
from instep.recording.sequences import SequenceIndex, all_frames
from instep.server.signals import run_cancellable
from instep.verify.command import run as verify
from instep_client import AsyncClient, InstepError
from instep_tools.plan import most_at_once

FAILED: Final = 1


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
    _make_room(recording)
    utterances, folder = load_utterances("test"), MODEL_FOLDER
    lengths = [len(frames) for frames in utterances.frames]
    producers = [
        Producer(f"utterance-{number}", frames, part)
        for number, (frames, part) in enumerate(zip(utterances.frames, timetable(lengths, speed), strict=True), start=1)
    ]
    heard = Heard(lengths, SPEAKERS)
    connections = connections_for(len(producers))  # before the engine starts, which inherits the limit of open files

    say(console, f"starting the engine with the model in {folder}")
    first: Stopped | KeyboardInterrupt | None = None
    try:
        verified = ["--verify-live"] if keep else []  # the dashboard shows it
        with ChildServer(folder, ["--record", str(recording), *verified], administered=True) as server:
            said = server.started
            say(console, f"serving at {server.endpoint} on {said['device']}, {said['exactness']}")
            for line in _load(producers, connections, speed):
                say(console, line)
            seconds, stats = run_cancellable(
                _stream(server.endpoint, producers, connections, heard, utterances.speakers, console)
            )
            is_received = received_is_recorded(recording, producers, heard)
            _show(heard, utterances, seconds, stats, console)
            title = f"{len(producers)} recordings of nine speakers, streamed frame by frame"
            draw(heard, utterances.speakers, picture, title)
            if keep:
                say(console, f"dashboard: {said.get('http', 'none, because another program uses its port')}")
                say(console, f"in a terminal: {program()} top {server.endpoint}")
                say(console, "streaming the same recordings again and again; Ctrl-C ends it, and verifies them all")
                try:
                    while True:
                        again = Heard(lengths, SPEAKERS)
                        run_cancellable(stream_all(server.endpoint, producers, connections, again))
                except (Stopped, KeyboardInterrupt) as stop:
                    first = stop
                    raise
    except (Stopped, KeyboardInterrupt) as stop:
        if stop is not first:  # before the repeating, or a second one, which has killed the server
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


def _show(heard: Heard, utterances: Utterances, seconds: float, stats: dict[str, float], console: Console) -> None:
    right = right_after(heard.outputs, utterances.speakers)
    trained = accuracy(load_model(MODEL_FOLDER), utterances).last_frame
    console.print(accuracy_table(right))
    say(console, f"speakers named correctly at the last frame: {right[:, -1].mean():.2%} as streamed here,")
    say(console, f"{trained:.2%} by the trained model over whole recordings")
    console.print(speed_table(heard, seconds, stats))


def _make_room(recording: Path) -> None:
    """Take away what an earlier demo recorded: the engine never writes over a recording by itself."""
    recording.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        recording.with_name(recording.name + suffix).unlink(missing_ok=True)


def _load(producers: Sequence[Producer], connections: int, speed: float) -> tuple[str, str]:
    frames = sum(len(producer.frames) for producer in producers)
    firsts, lasts = np.transpose([producer.part.due_s[[0, -1]] for producer in producers])
    at_once = most_at_once(firsts, lasts, np.ones(len(producers), np.int64))
    rates = f"{speed / SLOWEST_S:g} to {speed / FASTEST_S:g} frames/s"
    return (
        f"streaming {len(producers)} recordings of nine speakers saying /ae/, {frames:,} frames, from",
        f"{connections} connections, {rates} each, up to {at_once} at once",
    )


async def _stream(
    endpoint: str, producers: Sequence[Producer], connections: int, heard: Heard, speakers: I32, console: Console
) -> tuple[float, dict[str, float]]:
    """The seconds it took, and the server's own numbers after it."""
    async with streaming(console, heard, speakers):
        seconds = await stream_all(endpoint, producers, connections, heard)
    async with AsyncClient(endpoint, "demo") as client:
        return seconds, await client.stats()


def received_is_recorded(recording: Path, producers: Sequence[Producer], heard: Heard) -> bool:
    """Whether the recording holds what every producer sent and received, bit for bit, and nothing else."""
    with RecordingReader(recording) as reader:
        index = SequenceIndex(reader, lambda share: None, all_frames)
        held = index.sequences(index.kept)
    recorded = {
        stream.name: (held.x[places].tobytes(), held.y[places].tobytes())
        for stream, places in zip(index.streams, map(held.places, index.kept), strict=True)
    }
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
    """How to call this program here: by a path where it is not on PATH, as in `make demo`."""
    if shutil.which("instep"):
        return "instep"
    script, here = Path(sys.executable).with_name("instep"), Path.cwd()
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m instep"
    is_below = script.is_relative_to(here) and script.parent != here
    return shlex.quote(str(script.relative_to(here) if is_below else script))
