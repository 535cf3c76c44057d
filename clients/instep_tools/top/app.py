"""The options of `top`, which `instep` and `instep-client` share; what it needs is imported when it runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from instep_client.endpoint import DEFAULT_HTTP_PORT
from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_client.protocol.errors import InvalidInput
from instep_tools.command_line import AsJson, ModelName, endpoint


def examples(program: str) -> list[str]:
    """Command lines for the help of `instep` or `instep-client`."""
    return [f"{program} top", f"{program} top -e http://gpu-1:5780 --token-file token", f"{program} top --once --json"]


def _any_endpoint(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        try:
            return endpoint(text)
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{error.message}, or http://127.0.0.1:{DEFAULT_HTTP_PORT}") from None
    from instep_tools.top.http_source import checked_url

    try:
        return checked_url(text)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None


def top_command(
    context: typer.Context,
    where: Annotated[
        str | None,
        typer.Argument(metavar="ENDPOINT", help="The same as --endpoint.", show_default=False),
    ] = None,
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            "-e",
            envvar="INSTEP_ENDPOINT",
            help="Where the server listens: tcp:// or ipc://, or its HTTP endpoint, http://HOST:PORT.",
        ),
    ] = DEFAULT_ENDPOINT,
    model: ModelName = "",
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often it looks again.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one view and end; so it does without a terminal.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What a server's HTTP endpoint asks for (its http.token_file).", dir_okay=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch a server in the terminal: frames per second, latency, batches, refusals and the busiest streams.

    Keys are shown with ?; q quits. With --json, one view is printed as one JSON object.
    """
    from instep_tools.running import run_undrained
    from instep_tools.terminal import Terminal
    from instep_tools.top.command import Top, top

    source = context.get_parameter_source("endpoint")
    if where is not None and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter(f"{where} was already named: name one endpoint", param_hint="--endpoint")
    what = Top(_any_endpoint(endpoint if where is None else where), model, every, once, token_file)
    raise typer.Exit(run_undrained(partial(top, what), Terminal(as_json)))
