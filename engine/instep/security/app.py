"""The command `instep keys new`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from instep_tools.command_line import CommandLine

app = CommandLine(help="Make the keys by which servers and clients know each other.")


@app.callback()
def _keep_new_below_keys() -> None:
    """Make the keys by which servers and clients know each other."""


@app.command(
    examples=[
        "instep keys new server --role server",
        "instep keys new mic-7",
        "instep keys new lab --streams 'mic-*' --streams 'imu-*'",
    ]
)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom the keys are for.")],
    *,
    role: Annotated[
        Literal["producer", "reader", "operator", "node", "server"], typer.Option(help="What they are for.")
    ] = "producer",
    streams: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Which streams it may use; repeat for more. Default: NAME and NAME-* for a producer, else all.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")] = Path("keys"),
) -> None:
    """Make a public key, NAME.key, and a secret one, NAME.key_secret.

    Prints the line of the key for transport.peers_file, or with `--role server` the server's settings. Exit status 0:
    both files were written. 2: nothing was written.
    """
    if role == "server" and streams:
        raise typer.BadParameter("a server uses no streams", param_hint="--streams")
    from rich.console import Console

    from instep.security.keys import make_key_pair
    from instep_client.key_files import read_public_key

    public, secret = make_key_pair(name, output)
    Console(stderr=True).print(f"wrote {public}, and {secret}, which is to stay secret", soft_wrap=True)
    if role == "server":
        typer.echo(f"transport: {{key_file: {json.dumps(str(secret.resolve()))}, peers_file: peers.yaml}}")
        return
    patterns = streams or ([name, f"{name}-*"] if role == "producer" else [])
    shown = f", streams: {json.dumps(patterns, ensure_ascii=False)}" if patterns else ""
    typer.echo(f'"{name}": {{key: "{read_public_key(public)}", role: {role}{shown}}}')
