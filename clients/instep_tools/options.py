"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from instep_tools.command_line import endpoint as checked_endpoint

Endpoint = Annotated[
    str,
    typer.Option(
        "--endpoint",
        "-e",
        envvar="INSTEP_ENDPOINT",
        callback=checked_endpoint,
        help="Where the engine listens.",
        show_default=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
