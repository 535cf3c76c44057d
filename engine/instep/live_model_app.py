"""The commands `instep model` for a server that runs: load, swap and unload a model, shadow one with a candidate."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instep.model_app import Json, say
from instep.model_app import app as app
from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_tools.command_line import Endpoint
from instep_tools.words import counted

if TYPE_CHECKING:
    from instep_client.replies import ServedModel


@app.command(examples=("instep model load ears-2 models/ears-new",))
def load(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What clients will call it.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the model.")],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    json: Json = False,
) -> None:
    """Have the server on this machine serve another model, beside those that it has.

    If it cannot be loaded, nothing changes. A restart serves what the server's configuration names.
    """
    from instep_client import Client

    with Client(endpoint, model="") as client:
        models = client.load_model(name, folder)
    version = _version(name, folder, endpoint)
    if json:
        _print({**version, "models": _as_json(models)})
        return
    _say_version(version, "served as")
    _list(models)


@app.command(
    examples=(
        "instep model swap ears models/ears-new",
        "instep model swap ears models/ears-new --streams move",
        "instep model swap ears models/ears-new --streams replay:256",
    )
)
def swap(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of its new version.")],
    streams: Annotated[
        str,
        typer.Option(
            metavar="keep|move|replay:N",
            help="Whether open streams keep the old version until they close, move to the new one with their states, "
            "or begin in it with the state that it has after their last N recorded frames.",
        ),
    ] = "keep",
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    json: Json = False,
) -> None:
    """Have the server on this machine replace a model by another version of it.

    If that cannot be done, nothing changes. Put the new folder into the server's configuration before its next restart.
    """
    from instep_client import Client

    with Client(endpoint, model="") as client:
        before = {model.name for model in client.list_models()}
        models = client.swap_model(name, folder, streams)
    version = _version(name, folder, endpoint)
    new = next(model for model in models if model.name == name)
    kept = next((model for model in models if model.name not in before), None)
    if json:
        became = {"moved_streams": new.streams if kept is None else 0, "old_version": kept and kept.name}
        _print({**version, **became, "models": _as_json(models)})
        return
    _say_version(version, "now")
    if kept is not None:
        if (new.features, new.outputs) != (kept.features, kept.outputs):
            sizes = f"{counted(new.features, 'feature')} and gives {counted(new.outputs, 'output')}"
            say(f"it takes {sizes}; the old version has {kept.features:,} and {kept.outputs:,}")
        say(f"{counted(kept.streams, 'open stream')} of the old version: served as {kept.name} until closed")
    else:
        states = "copied" if streams == "move" else "computed from the last frames"
        say(f"{counted(new.streams, 'open stream')} moved to it, states {states}")
    _list(models)


@app.command(examples=("instep model unload ears-1", "instep model unload ears-1 --force"))
def unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    force: Annotated[bool, typer.Option("--force", help="Also while streams are in use.")] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    json: Json = False,
) -> None:
    """Have the server on this machine answer what a model has admitted, and serve it no longer.

    It refuses while streams are in use. With --force they stop: a recording keeps them for when the model is loaded
    again; without one they end, and their owners are told. Connections to the model end in any case.
    """
    from instep.models.errors import ModelError
    from instep_client import Client

    with Client(endpoint, model="") as client:
        served = [model.name for model in client.list_models()]
    if served == [name]:
        raise ModelError(f"{name} is the only model: load another one first, or stop the server")
    other = next((each for each in served if each != name), "")
    with Client(endpoint, model=other) as client:  # a model is not unloaded over a connection of its own
        models = client.unload_model(name, force=force)
    if json:
        _print({"models": _as_json(models)})
        return
    _list(models)


@app.command(
    examples=(
        "instep model shadow ears.instep models/ears-new --for 600",
        "instep model shadow ears.instep models/ears-new --tolerance 0.01 --json",
    )
)
def shadow(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="The recording that a server writes.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the candidate.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The share of the streams, by their names.")] = 0.1,
    seconds: Annotated[
        float | None,
        typer.Option("--for", min=0.0, help="Seconds. Default: until Ctrl-C, SIGTERM or SIGHUP.", show_default=False),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Begin with this many frames of each stream, uncompared, instead of its state. Default: the state, or "
            "256 frames where the candidate's states are others.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="The largest difference that is no failure.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Compare a candidate's outputs with those that a server gives, on a share of its streams, while it serves.

    The candidate runs in this process, at the lowest priority, on the frames in the server's recording. It never
    answers, and the server does not know of it. Exit status 0: frames were compared. 1: a value differed by more than
    --tolerance. 2: nothing was compared.
    """
    import os

    from rich.console import Console

    from instep import interrupts
    from instep.shadow.command import Shadowing, run

    interrupts.raise_stopped()
    os.nice(19)
    asked = Shadowing(recording, folder, share, seconds, warm_up, tolerance, json)
    raise typer.Exit(run(asked, Console(highlight=False, soft_wrap=True)))


def _version(name: str, folder: Path, endpoint: str) -> dict[str, Any]:
    """Which version of a model is served now, and whether a restart serves it, too; None from an older server."""
    from instep_client import Client

    with Client(endpoint, model=name) as client:
        fingerprint, configured = client.info.fingerprint, client.stats().get("configured")
    return {
        "model": name,
        "fingerprint": fingerprint,
        "folder": str(folder.resolve()),
        "configured": None if configured is None else bool(configured),
    }


def _say_version(version: dict[str, Any], how: str) -> None:
    say(f"{version['model']} is {how} version {version['fingerprint'][:8]}")
    if version["configured"] is False:
        say("a restart serves what the configuration names, which is not this folder;")
        say(f"put it into model.folder to keep it: {version['folder']}")


def _list(models: Sequence[ServedModel]) -> None:
    say(f"the server has {', '.join(model.name for model in models)}")


def _as_json(models: Sequence[ServedModel]) -> list[dict[str, Any]]:
    return [model._asdict() for model in models]


def _print(values: dict[str, Any]) -> None:
    typer.echo(jsonlib.dumps(values, indent=2))
