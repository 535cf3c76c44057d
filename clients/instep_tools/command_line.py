"""The base of the command line: commands loaded when they are typed, help with examples, and plain messages."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
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


FORMER: Final = {
    "cluster down": "cluster ray down",
    "cluster up": "cluster ray up",
    "config": "doctor --settings",
    "help": "--help",
    "version": "--version",
    "keys list": "streams list, or read transport.peers_file",
    "keys show": "keys new NAME; the public key is in NAME.key",
    "model info": "model check FOLDER",
    "models": "ping",
    "produce": "send",
    "recordings verify": "verify",
    "replay": "send FILE",
    "state snapshot": "state save --output FILE",
    "stats": "ping --all",
    "streams park": "streams close --park",
    "replay-from": "recordings state … --open NAME",
}
"""Commands by names that they had, or that others would give them."""


class CommandLine(typer.Typer):
    """An application with the settings that all command lines share.

    `cls` is the class of the group, for a command line with its own errors.
    """

    def __init__(self, *, help: str = "", cls: type[TyperGroup] | None = None, **settings: Any) -> None:
        super().__init__(
            **{"add_completion": False, **settings},
            cls=cls or PlainCommands,
            help=help,
            no_args_is_help=True,
            rich_markup_mode="markdown",
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
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
        --model and --json; the keys are options of the program, which `LazyCommands` accepts after a command, too. A
        CommandProblem or an InstepError that it raises is printed as one sentence.

        With `drains`, the first Ctrl-C requests a stop, see `run_command`; otherwise it cancels the command. Without
        `names_model`, there is no --model.
        """

        def register(command: ServerCommand) -> ServerCommand:
            def run(endpoint: str, as_json: bool, model: str = "", **own: Any) -> None:
                from instep_tools.connect import Target, leave_warnings_out
                from instep_tools.running import run_command
                from instep_tools.terminal import Terminal

                def begin(terminal: Terminal, stop: Stop) -> Awaitable[Exit]:
                    return command(Target(endpoint, model), terminal, stop, **own)

                leave_warnings_out()
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


def add_root_options(app: CommandLine) -> None:
    """Add --version, and the options of a connection, which may be written before or after a command."""

    def show(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version

            typer.echo(f"instep {version('instep')}")
            raise typer.Exit

    def root(version: bool, **connection: str | None) -> None:
        os.environ |= {f"INSTEP_{name.upper()}": value for name, value in connection.items() if value}

    version = typer.Option("--version", "-V", callback=show, is_eager=True, help="Print the version and exit.")
    options = [
        parameter("version", False, Annotated[bool, version]),
        parameter("endpoint", None, RootEndpoint),
        parameter("key_file", None, KeyFile),
        parameter("server_key", None, ServerKey),
    ]
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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed, or say what its name is now."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:  # typer exports no class for it
            now = FORMER.get(" ".join([*ctx.command_path.split()[1:], args[0]]))
            if now is not None:
                error.message = f"No such command {args[0]!r}; it is: instep {now}"  # type: ignore[attr-defined]
            raise


class LazyCommands(PlainCommands):
    """The commands of a program, each imported when it is typed or listed.

    A subclass names their places: by topic, for the help, and by name, the module whose `app` has the command or is it.
    """

    topics: Mapping[str, Mapping[str, str]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LoadedCommands(self.topics)  # type: ignore[assignment]  # it is never changed

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, without loading a command."""
        return list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command, and those of the keys wherever they are."""
        before: list[str] = []
        after = list(args)
        for name in ("--key-file", "--server-key"):
            for at, word in enumerate(after):
                if word == name or word.startswith(f"{name}="):
                    length = 2 if word == name else 1
                    if at + length > len(after):
                        break  # the command says that the value is missing
                    before += after[at : at + length]
                    del after[at : at + length]
                    break
        return super().parse_args(ctx, [*before, *after])


class _LoadedCommands(Mapping[str, Any]):
    """Commands by name, imported when they are looked up."""

    def __init__(self, topics: Mapping[str, Mapping[str, str]]) -> None:
        self._places = {name: (topic, module) for topic, modules in topics.items() for name, module in modules.items()}

    def __getitem__(self, name: str) -> Any:
        topic, module = self._places[name]
        found = typer.main.get_command(import_module(module).app)
        found = getattr(found, "commands", {}).get(name, found)
        found.name, found.rich_help_panel = name, topic
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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


def _root_endpoint(text: str | None) -> str | None:
    return None if text is None else endpoint(text)


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
RootEndpoint = Annotated[
    str | None,
    typer.Option("--endpoint", "-e", callback=_root_endpoint, metavar="ADDRESS", help="The server's endpoint."),
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
