"""The base of both command lines: help with examples, shared options, and plain messages for invalid values."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_client.protocol.errors import InvalidInput

if TYPE_CHECKING:
    from instep_tools.pacing import Stop
    from instep_tools.problems import Exit
    from instep_tools.terminal import Terminal

ServerCommand = TypeVar("ServerCommand", bound=Callable[..., Awaitable["Exit"]])

BROKEN_PIPE: Final = 141
"""The exit status if nobody reads the output any more, as in `instep verify FILE | head -1`: 128 + SIGPIPE."""
_PLAIN: Final = {
    "int_parsing": "{value!r} is not a whole number",
    "int_from_float": "{value!r} is not a whole number",
    "float_parsing": "{value!r} is not a number",
    "greater_than_equal": "it must be at least {ge}, not {value}",
    "less_than_equal": "it must be at most {le}, not {value}",
}
"""Messages by pydantic's kinds of errors, which newer versions of typer raise."""


class CommandLine(typer.Typer):
    """An application with the settings that all command lines share.

    `cls` is the class of the group, for a command line with its own errors.
    """

    def __init__(self, *, help: str, cls: type[TyperGroup] | None = None, **settings: Any) -> None:
        super().__init__(
            cls=cls or PlainCommands,
            help=help,
            no_args_is_help=True,
            rich_markup_mode="markdown",
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Run the typed command and exit; silently with `BROKEN_PIPE` if nobody reads the output."""
        try:
            try:
                return super().__call__(*args, **settings)
            finally:
                sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:
            # typer and rich exit with 1 instead of raising it
            if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush fails again
            raise SystemExit(BROKEN_PIPE) from None

    def command(  # type: ignore[override]  # names only the settings that are used here
        self, name: str | None = None, *, examples: Sequence[str] = (), **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command, with example command lines for its help."""
        return super().command(name, cls=PlainCommand, epilog="\n".join(examples), **settings)

    def server_command(
        self, name: str, *, examples: Sequence[str], drains: bool = False, names_model: bool = True
    ) -> Callable[[ServerCommand], ServerCommand]:
        """Register a coroutine function that talks to a server; its result is the exit status.

        It is called with the `Target`, the `Terminal`, the `Stop` and its own options. Its command also has --endpoint,
        --model and --json; the keys are options of the program. A CommandProblem or an InstepError that it raises is
        printed as one sentence.

        With `drains`, the first Ctrl-C requests a stop, see `run_command`; otherwise it cancels the command. Without
        `names_model`, there is no --model.
        """

        def register(command: ServerCommand) -> ServerCommand:
            def run(endpoint: str, as_json: bool, model: str = "", **own: Any) -> None:
                from instep_tools.connect import Target
                from instep_tools.running import run_command
                from instep_tools.terminal import Terminal

                def begin(terminal: Terminal, stop: Stop) -> Awaitable[Exit]:
                    return command(Target(endpoint, model), terminal, stop, **own)

                raise typer.Exit(run_command(begin, Terminal(as_json), drains=drains))

            own = list(inspect.signature(command, eval_str=True).parameters.values())[3:]
            shared = [
                parameter("endpoint", DEFAULT_ENDPOINT, Endpoint),
                *([parameter("model", "", ModelName)] if names_model else []),
                parameter("as_json", False, AsJson),
            ]
            self.command(name, examples=examples)(typed_as(run, command, [*own, *shared]))
            return command

        return register


def parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    """An option or argument that `typed_as` gives to a command."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def typed_as(
    run: Callable[..., None], command: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Wrap a function of keyword arguments as one with these parameters, and a command's name and help."""
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def add_root_options(app: CommandLine, *, keys: bool = False) -> None:
    """Add the options that are written before a command: --version and, with `keys`, --key-file and --server-key."""

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            typer.echo(f"{app.info.name} {version('instep')}")
            raise typer.Exit

    def root(version: bool, **keys: str | None) -> None:
        os.environ |= {f"INSTEP_{name.upper()}": value for name, value in keys.items() if value}  # for every client

    version = typer.Option("--version", "-V", callback=show, is_eager=True, help="Print the version and exit.")
    options = [parameter("version", False, Annotated[bool, version])]
    if keys:
        options += [parameter("key_file", None, KeyFile), parameter("server_key", None, ServerKey)]
    app.callback()(typed_as(root, root, options))


class PlainCommand(TyperCommand):
    """A command. Its help shows flags without a value, and ends with examples."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options."""
        return _with_plain_flags(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        examples, self.epilog = self.epilog, None  # typer would join its lines
        super().format_help(ctx, formatter)
        self.epilog = examples
        if examples:
            typer.echo(" Examples:\n")
            for line in examples.splitlines():
                typer.echo(f"   {line}")


class PlainCommands(TyperGroup):
    """A group of commands that report invalid values of options in plain words."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run the typed command and exit."""
        try:
            return super().main(args, *others, **settings)
        except SystemExit as end:
            # typer has said on stderr why it cannot run what was typed, and exits instead of raising it
            sentence = getattr(end.__context__, "format_message", None)
            if sentence is not None and "--json" in (sys.argv if args is None else args):
                typer.echo(json.dumps({"error": sentence()}))
            raise

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of the group itself."""
        return _with_plain_flags(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if ctx.parent is None:  # a group within a group has raised it as it was
                error.message = in_plain_words(error)
            raise
        except Exception as error:
            name = getattr(error, "option_name", None)
            if name in [each for param in self.params for each in param.opts]:
                error.message = f"{name} goes before the command: {ctx.info_name} {name} …"  # type: ignore[attr-defined]
            raise


def _with_plain_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""  # not <bool>, which reads as if --json took a value
    return params


def in_plain_words(error: typer.BadParameter) -> str:
    """The error's message, without the wording of the library that found it."""
    errors = getattr(error.__cause__, "errors", None)
    if errors is not None:
        (found, *_) = errors()
        sentence = _PLAIN.get(found["type"])
        if sentence is not None:
            return sentence.format(value=found["input"], **found.get("ctx", {}))
    message = error.message.removeprefix("Value error, ")
    typed, _, choices = message.partition(" is not one of ")
    close = get_close_matches(typed.strip("'"), re.findall("'([^']+)'", choices), n=1)
    return f"{message} Did you mean {close[0]!r}?" if close else message


def endpoint(text: str) -> str:
    """Check that a client may connect to an endpoint, or to several, separated by commas.

    Raises:
        typer.BadParameter: naming the expected form.
    """
    from instep_client.arguments import checked_endpoint  # with numpy, which --help does without

    try:
        return ",".join(checked_endpoint(each.strip(" ")) for each in text.split(","))
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None


def positive(value: float | None) -> float | None:
    """Check that a number may be a rate or a time.

    Raises:
        typer.BadParameter: when it is 0, negative or infinite.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter("it must be more than 0")
    return value


Endpoint = Annotated[
    str,
    typer.Option(
        "--endpoint",
        "-e",
        envvar="INSTEP_ENDPOINT",
        callback=endpoint,
        metavar="ADDRESS",
        help="The server's endpoint, or those of several servers of a cluster, separated by commas.",
        show_default=True,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        envvar="INSTEP_MODEL",
        help="The model to use. (default: the server's first)",
        show_default=False,
    ),
]
KeyFile = Annotated[str | None, typer.Option(metavar="FILE", envvar="INSTEP_KEY_FILE", help="Your NAME.key_secret.")]
ServerKey = Annotated[
    str | None, typer.Option(metavar="FILE", envvar="INSTEP_SERVER_KEY", help="The server's key, or its file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
