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
Stream = Annotated[str, typer.Argument(metavar="STREAM", help="Its name or number.", show_default=False)]
ModelFolder = Annotated[
    Path | None,
    typer.Option("--model", metavar="FOLDER", help="The model. Default: where the recording says.", show_default=False),
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
        typer.Option(min=0, metavar="N", help="Before this frame. Default: after the last one.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.safetensors", help="Save it as a snapshot, in a new file.", show_default=False
        ),
    ] = None,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Show the state of a recorded stream before any of its frames, exact to the bit.

    It is stepped again from the newest recorded state before that. `instep-client state restore` continues a stream
    from the file of --out. Exit status 0: done. 2: it cannot be had exactly, and the sentence says why.
    """
    from instep.replay.state import run

    interrupts.raise_stopped()
    run(recording, stream, seq, model_folder=model, out=out, json=json, console=make_console())


def replay_from(
    recording: Recording,
    stream: Stream,
    seq: Annotated[int, typer.Option(min=0, metavar="N", help="Its next frame.", show_default=False)],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="The new stream. Default: STREAM@N.", show_default=False)
    ] = None,
    continues: Annotated[
        bool, typer.Option("--continue", help="Send the recorded frames after that, and compare the outputs.")
    ] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Open a stream on a running server that continues from a frame of a recorded one: what if other frames had come?

    The server keeps it parked until a producer resumes it, for as long as the answer says. Exit status 0: done.
    1: outputs differ from the recorded ones. 2: it could not be done.
    """
    if name == "":
        raise typer.BadParameter("a stream needs a name: write one, or leave --as out for STREAM@N", param_hint="--as")

    from instep.replay.replay_from import run

    interrupts.raise_stopped()
    options: dict[str, Any] = {"name": name, "model_folder": model, "endpoint": endpoint}
    raise typer.Exit(run(recording, stream, seq, continues=continues, json=json, **options))
