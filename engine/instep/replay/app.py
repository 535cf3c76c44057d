"""The commands that go back to a frame of a recording, as typed: `recordings state` and `replay-from`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from instep import interrupts
from instep.recording.app import Json, make_console
from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_tools.command_line import CommandLine, Endpoint

STATE_EXAMPLES: Final = (
    "instep recordings state today.instep mic-7 --seq 1200",
    "instep recordings state today.instep mic-7 --seq 1200 --out then.safetensors",
)
REPLAY_EXAMPLES: Final = (
    "instep replay-from today.instep mic-7 --seq 1200",
    "instep replay-from today.instep mic-7 --seq 1200 --as what-if --continue",
)

Recording = Annotated[Path, typer.Argument(metavar="FILE", help="The recording.", show_default=False)]
Stream = Annotated[str, typer.Argument(metavar="STREAM", help="The stream's name or number.", show_default=False)]
ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model", metavar="FOLDER", help="The model's folder. Default: the recorded path.", show_default=False
    ),
]


def add_to(engine: CommandLine, recordings: CommandLine) -> None:
    """Register the commands."""
    recordings.command("state", examples=STATE_EXAMPLES)(state)
    engine.command("replay-from", examples=REPLAY_EXAMPLES)(replay_from)


def state(
    recording: Recording,
    stream: Stream,
    seq: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="The state before frame N. Default: after the last.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.safetensors", help="Save the state as a snapshot.", show_default=False),
    ] = None,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Compute the exact state of a recorded stream before any of its frames.

    The frames since the newest recorded state are stepped again. `instep-client state restore` opens a stream with the
    file of --out. Exit status 0: done. 2: the exact state cannot be computed, and the message gives the reason.
    """
    from instep.replay.state import run

    interrupts.raise_stopped()
    run(recording, stream, seq, model_folder=model, out=out, json=json, console=make_console())


def replay_from(
    recording: Recording,
    stream: Stream,
    seq: Annotated[
        int, typer.Option(min=0, metavar="N", help="The new stream continues with frame N.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="The new stream's name. Default: STREAM@N.", show_default=False),
    ] = None,
    continues: Annotated[
        bool, typer.Option("--continue", help="Send the recorded frames from N on, and compare outputs.")
    ] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Branch a live stream from any recorded frame.

    Opens a stream on a running server with the state before frame N, and leaves it parked until a producer resumes it.
    Exit status 0: done. 1: outputs differ from the recorded ones. 2: the stream could not be opened.
    """
    if name == "":
        raise typer.BadParameter("a stream needs a name: write one, or leave --as out for STREAM@N", param_hint="--as")

    from instep.replay.replay_from import run

    interrupts.raise_stopped()
    options: dict[str, Any] = {"name": name, "model_folder": model, "endpoint": endpoint}
    raise typer.Exit(run(recording, stream, seq, continues=continues, json=json, **options))
