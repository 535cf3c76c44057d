"""The program `instep`: all commands by topic, each imported when it is typed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import typer

from instep import interrupts
from instep_tools.app import TOPICS as CLIENT_TOPICS
from instep_tools.command_line import CommandLine, LazyCommands, add_root_options

_ENGINE: Final = "instep.cli"


class AllCommands(LazyCommands):
    """All commands. They end with a red sentence and an exit status after users' errors and signals."""

    topics: Mapping[str, Mapping[str, str]] = {
        "Serve": dict.fromkeys(("serve", "demo", "doctor"), _ENGINE),
        **CLIENT_TOPICS,
        "Recordings": dict.fromkeys(("verify", "export", "recordings"), _ENGINE),
        "Models, keys, clusters": dict.fromkeys(("model", "keys", "cluster"), _ENGINE),
    }

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run the typed command."""
        as_json = "--json" in (sys.argv if args is None else args)
        try:
            os.getcwd()
        except FileNotFoundError:  # torch cannot be loaded there; MKL ends the process with a misleading sentence
            _fail("the working directory was deleted: change to one that exists", as_json=as_json)
            raise SystemExit(2) from None
        try:
            return super().main(args, *others, **settings)
        except interrupts.Stopped as stop:
            _fail(str(stop), as_json=as_json)
            raise
        except Exception as error:
            from instep.cli import users_errors

            if not isinstance(error, users_errors()):
                raise
            from instep.recording.errors import with_advice

            _fail(with_advice(error), as_json=as_json)
            raise SystemExit(2) from error


app = CommandLine(
    cls=AllCommands,
    add_completion=True,
    name="instep",
    help="Serve recurrent networks to many live streams, record what was served, and verify it.",
)
add_root_options(app)


def main() -> None:
    """Run the command line and end the process with its exit status; called by `instep.__main__`."""
    app(prog_name="instep")


def _fail(sentence: str, *, as_json: bool) -> None:
    """Print the error in red on stderr, and as a JSON object on stdout with --json."""
    from rich.console import Console

    from instep_tools.terminal import say

    if as_json:
        typer.echo(json.dumps({"error": sentence}))
    with suppress(OSError):  # its terminal has closed
        for line in sentence.splitlines():
            say(Console(stderr=True), f"error: {line}", "red")
