"""The options that `instep serve` and `instep config` share: those of the configuration."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from instep_tools.command_line import parameter, typed_as

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML; configs/default.yaml is the manual.")
]
ModelFolders = Annotated[list[Path], typer.Argument(metavar="MODEL", help="Folder of the model, or of each.")]
Demo = Annotated[bool, typer.Option("--demo", help="The model of `instep demo` instead.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any key: --set limits.max_idle_s=60; repeatable.")
]


class _Flag(NamedTuple):
    """A key of the configuration that has an option of its own."""

    key: str
    name: str
    metavar: str
    """Empty for a switch."""
    help: str


_FLAGS: Final = (
    _Flag("transport.endpoint", "--endpoint", "ENDPOINT", "tcp://HOST:PORT or ipc://PATH."),
    _Flag("transport.allow_plaintext", "--allow-plaintext", "", "Listen for other machines without encryption."),
    _Flag("engine.device", "--device", "DEVICE", "auto, cpu, cuda or cuda:N."),
    _Flag("engine.max_streams", "--max-streams", "N", "Streams open at once."),
    _Flag("engine.max_batch_size", "--max-batch-size", "N", "Streams in one step."),
    _Flag("engine.max_queue_delay_us", "--max-queue-delay-us", "N", "Microseconds to wait for a fuller batch."),
    _Flag("http.endpoint", "--http", "ENDPOINT", "Of the admin server: HOST:PORT, or off."),
    _Flag("limits.max_idle_s", "--max-idle-s", "N", "Seconds until a silent stream is closed."),
    _Flag("recording.file", "--record", "FILE", "Write a recording, or continue it; a folder for several models."),
    _Flag("recording.durability", "--durability", "LEVEL", "What answers wait for: memory, commit or fsync."),
    _Flag("verify.live", "--verify-live", "", "Replay what is recorded in another process, and compare."),
    _Flag("log.level", "--log-level", "LEVEL", "debug, info, warning or error."),
    _Flag("log.format", "--log-format", "FORMAT", "console or json."),
)


@dataclass(frozen=True, slots=True)
class Given:
    """Where a command's configuration comes from, besides the environment."""

    file: Path | None
    overrides: dict[str, str | None]
    """By `section.key`; None where `--set` names a key without a value."""


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a `Given`, the options that `serve` has for its configuration."""
    flags = {flag.name.strip("-").replace("-", "_"): flag for flag in _FLAGS}

    def run(models: list[Path], demo: bool, config: Path | None, settings: list[str], **values: Any) -> None:
        from instep.demo import MODEL_FOLDER

        if demo and models:
            raise typer.BadParameter(f"name a model or ask for the demo's, not both: {models[0]}", param_hint="--demo")
        folders = [str(folder) for folder in ([MODEL_FOLDER] if demo else models)]
        named = {} if not folders else {"model.folder": folders[0] if len(folders) == 1 else json.dumps(folders)}
        for name, flag in flags.items():
            value = values.pop(name)
            if value is not None and value is not False:
                named[flag.key] = value if flag.metavar else "true"
        command(Given(config, _overrides(settings, named)), **values)

    def of_flag(name: str, flag: _Flag) -> inspect.Parameter:
        panel = f"Options: {flag.key.partition('.')[0]}"
        if not flag.metavar:
            option = typer.Option(flag.name, help=flag.help, rich_help_panel=panel)
            return parameter(name, False, Annotated[bool, option])
        option = typer.Option(flag.name, metavar=flag.metavar, help=flag.help, rich_help_panel=panel)
        return parameter(name, None, Annotated[str | None, option])

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [
        parameter("models", [], ModelFolders),
        parameter("demo", False, Demo),
        parameter("config", None, ConfigFile),
        *(of_flag(name, flag) for name, flag in flags.items()),
        parameter("settings", [], Settings),
        *own,
    ]
    return typed_as(run, command, parameters)


def _overrides(settings: Sequence[str], named: dict[str, str]) -> dict[str, str | None]:
    """The values of `--set` and of the named flags, by `section.key`."""
    overrides: dict[str, str | None] = dict(named)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if path in overrides:
            raise typer.BadParameter(f"{path} is set twice", param_hint="--set")
        overrides[path] = text if equals else None
    return overrides
