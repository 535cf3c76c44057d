"""The engine's commands. They import everything heavy themselves, so that `--help` appears immediately."""

from __future__ import annotations

import inspect
import json as jsonlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from instep import interrupts
from instep.cluster.app import DIRECTORY_ENDPOINT, DirectoryAt, ray_app
from instep.cluster.app import app as cluster_app
from instep.model_app import app as model_app
from instep.replay.app import ModelFolder
from instep.replay.app import recordings as recordings_app
from instep.security.app import app as keys_app
from instep_tools.command_line import CommandLine, typed_as

if TYPE_CHECKING:
    from rich.console import Console

    from instep.config import Config, LogConfig


_USERS_ERRORS: Final = {
    "instep.config": "ConfigError",
    "instep.models.errors": "ModelError",
    "instep.recording.errors": "RecordingError",
    "instep.replay.report": "CannotVerify",
    "instep.server.checks": "CannotServe",
    "instep_client.protocol.errors": "InstepError",
    "instep_tools.problems": "CommandProblem",
}
"""The exceptions whose message is for the user, by module: one that was raised is of a module that is loaded."""

app = CommandLine()
app.add_typer(model_app, name="model")
app.add_typer(recordings_app, name="recordings")
app.add_typer(cluster_app, name="cluster")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Recording = Annotated[Path, typer.Argument(metavar="FILE", help="The recording.")]
Streams = Annotated[
    list[str],
    typer.Option(
        metavar="PATTERN", help="Only streams of this name, pattern (as in 'mic-*') or number; repeat for more."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A YAML file; configs/default.yaml explains every key.")
]
ShardCount = Annotated[
    int, typer.Option("--shards", min=1, max=4096, help="How many shards the cluster has, now and for good.")
]
CopyCount = Annotated[
    int, typer.Option("--copies", min=0, max=1, help="How many copies each shard has on other nodes.")
]
Adopt = Annotated[
    str, typer.Option(metavar="NODE,NODE", help="After the store was lost: the nodes that have recordings.")
]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key, as in limits.max_idle_s=60; repeat for more."),
]


@dataclass(frozen=True, slots=True)
class Given:
    """The sources of a command's configuration besides the environment."""

    file: Path | None
    flags: dict[str, str]
    """Flags by `section.key`."""


def _given(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Model folders.")] = [],  # noqa: B006
    demo: Annotated[bool, typer.Option("--demo", help="Serve the model of `instep demo`.")] = False,
    config: ConfigFile = None,
    endpoint: Annotated[str | None, typer.Option(help="Where to listen: tcp://HOST:PORT or ipc://PATH.")] = None,
    http: Annotated[str | None, typer.Option(help="Where the admin server listens: HOST:PORT, or off.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    record: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where to record: a folder, or one file *.instep.", show_default=False),
    ] = None,
    verify_live: Annotated[
        bool, typer.Option("--verify-live", help="Check served outputs in another process.")
    ] = False,
    settings: Settings = [],  # noqa: B006
) -> Given:
    from instep.demo import MODEL_FOLDER

    if demo and models:
        raise typer.BadParameter(f"name a model or ask for the demo's, not both: {models[0]}", param_hint="--demo")
    folders = [str(folder) for folder in ([MODEL_FOLDER] if demo else models)]
    folder = None if not folders else folders[0] if len(folders) == 1 else jsonlib.dumps(folders)
    named = {
        "model.folder": folder,
        "transport.endpoint": endpoint,
        "http.endpoint": http,
        "engine.device": device,
        "recording.path": record,
        "verify.live": "true" if verify_live else None,
    }
    flags = {key: value for key, value in named.items() if value is not None}
    return Given(config, flags | _parse_settings(settings))


def _parse_settings(settings: Sequence[str]) -> dict[str, str]:
    flags = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting} should look like limits.max_idle_s=60", param_hint="--set")
        flags[key] = text
    return flags


def takes_settings(command: Callable[..., None], without: Collection[str] = ()) -> Callable[..., None]:
    """Replace a command's first parameter, a `Given`, by the options it is made from, `without` some of them."""
    given = inspect.signature(_given, eval_str=True).parameters
    shared = {name: each for name, each in given.items() if name not in without}

    def run(**values: Any) -> None:
        given = _given(**{name: values.pop(name) for name in shared})
        command(given, **values)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    return typed_as(run, command, [*shared.values(), *own])


@app.command(
    examples=[
        "instep serve my-model --record today.instep",
        "instep serve ears vowels --record recordings",
        "instep serve my-model --shards 4 --record recordings",
        "instep serve --config instep.yaml --check",
        "instep serve my-model --set engine.max_streams=100000 --set limits.park_s=60",
    ]
)
@takes_settings
def serve(
    given: Given,
    *,
    restart: Annotated[bool, typer.Option("--restart", help="Restart the server after a crash.")] = False,
    shards: Annotated[
        int, typer.Option("--shards", min=1, max=4096, help="Run this many servers, at successive ports.")
    ] = 1,
    check: Annotated[bool, typer.Option("--check", help="Check that the server could start, and exit.")] = False,
) -> None:
    """Serve one or more models to many streams.

    Ctrl-C and SIGTERM drain the server; SIGHUP reloads its configuration. Exit status 0: clean shutdown. 1: it failed
    while serving. 2: it could not start. 130: it was forced to stop.
    """
    from instep.config import ConfigError, load_config, unknown_variables

    def read() -> Config:
        return load_config(given.file, given.flags)

    try:
        loaded = read()
    except ConfigError as error:
        with _logged(error.log):
            raise
    if check:
        loaded = loaded.with_values({"log.file": None})  # it writes nothing
    from instep.server.checks import CannotServe, check_before_loading, rehearse
    from instep.server.log import make_log

    try:
        log = make_log(loaded.log)
    except OSError as error:
        raise CannotServe(f"log.file {loaded.log.file} cannot be written: {error.strerror}") from None
    with _logged(loaded.log):
        for sentence in unknown_variables():
            log.warning("unknown setting", reason=sentence)
        restart = restart or shards > 1
        if check:
            return rehearse(loaded, log, restart=restart, shards=shards)
        check_before_loading(loaded, log, restart=restart, shards=shards)  # before PyTorch, which takes seconds
        if shards > 1:
            from instep.cluster.shards import run as run_shards

            raise typer.Exit(run_shards(loaded, shards, reread=read))
        from instep.server.serve import run

        raise typer.Exit(run(loaded, reread=read, restart=restart))


@ray_app.command(
    examples=[
        "instep cluster ray up /srv/ears --shards 8 --record /var/lib/instep",
    ]
)
@partial(takes_settings, without=("demo", "endpoint", "http", "device", "verify_live"))
def up(
    given: Given,
    *,
    shards: ShardCount,
    copies: CopyCount = 1,
    adopt: Adopt = "",
) -> None:
    """Begin a cluster: the directory on Ray's head, and an agent on each node that has the resource `instep`.

    Folders and files are those of the nodes, and each node records in the folder of its name in that of --record. Nodes
    that join later get an agent, too. Exit status 0: it has begun; `instep cluster status --directory ray` shows when
    every shard is served. 2: it has not.
    """
    from instep.cluster.ray import up
    from instep.config import load_config

    port = load_config(given.file, given.flags).transport.endpoint.rpartition(":")[2]
    loaded = load_config(given.file, {**given.flags, "transport.endpoint": f"tcp://0.0.0.0:{port}"})
    typer.echo(f"The directory is at {up(loaded, shards, copies, adopt)}")


@cluster_app.command(
    examples=[
        "instep cluster directory --store /var/lib/instep-directory --shards 8",
        "instep cluster directory --store decisions --shards 4 --copies 0",
    ]
)
def directory(
    store: Annotated[Path, typer.Option(metavar="FOLDER", help="Where it stores what it decides.")],
    shards: ShardCount,
    copies: CopyCount = 1,
    endpoint: Annotated[str, typer.Option(help="Where to listen: tcp://HOST:PORT.")] = f"tcp://{DIRECTORY_ENDPOINT}",
    adopt: Adopt = "",
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Run the directory of a cluster: it decides which node serves each shard, and which has its copy.

    Run one for each cluster, and let a service manager start it again. While it is away, everything is served, and only
    changes wait. SIGHUP reloads transport.peers_file. Exit status 0: it was stopped. 2: it could not start.
    """
    from instep.cluster.directory import run
    from instep.config import load_config

    loaded = load_config(config, {"transport.endpoint": endpoint, **_parse_settings(settings)})
    with _logged(loaded.log):
        raise typer.Exit(run(loaded, store, shards, copies, [name for name in adopt.split(",") if name]))


@cluster_app.command(
    examples=[
        "instep cluster agent my-model --record data --endpoint tcp://10.0.0.2:5757",
    ]
)
@partial(takes_settings, without=("demo", "device", "verify_live"))
def agent(
    given: Given,
    *,
    directory: DirectoryAt = DIRECTORY_ENDPOINT,
    name: Annotated[
        str, typer.Option(metavar="NODE", help="Its name. Default: that of its key, or of the machine.")
    ] = "",
    host: Annotated[str, typer.Option(metavar="HOST", help="Where others reach it. Default: as in --endpoint.")] = "",
) -> None:
    """Run the agent of a node: it starts the servers and copies that the directory assigns to it.

    --endpoint is tcp://HOST:PORT: shard k listens at that port + k, and takes copies at that port + the number of
    shards. Ctrl-C and SIGTERM end its servers in order; SIGHUP reloads their configuration. Exit status 0: it was
    stopped. 1: a server failed again and again, or did not end in order. 2: it could not start. 130: it was forced to
    stop.
    """
    from instep.config import load_config

    def read() -> Config:
        return load_config(given.file, given.flags)

    loaded = read()
    with _logged(loaded.log):
        from instep.cluster.agent import run

        raise typer.Exit(run(loaded, read, directory, name, host))


@app.command(
    examples=[
        "instep verify today.instep",
        "instep verify today.instep --folder my-model --streams 'mic-*' --json",
        "instep verify monday.instep tuesday.instep",
        "instep verify /var/lib/instep --report today.html",
    ]
)
def verify(
    recordings: Annotated[
        list[Path], typer.Argument(metavar="FILE|FOLDER", help="Recordings, or folders of recordings.")
    ],
    folder: ModelFolder = None,
    streams: Streams = [],  # noqa: B006
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Also write an HTML report."),
    ] = None,
    json: Json = False,
) -> None:
    """Replay recordings, on any machine, and compare every output bit for bit.

    Shows the streams that differ. Exit status 0: everything was checked and matched. 1: an output differs. 2: something
    could not be checked. Of several recordings, each gets a line (with --json, an object) and a part of the report, and
    the worst result decides the status. Recordings without frames are skipped, unless all are empty.
    """
    from instep.replay.command import run

    interrupts.raise_stopped()
    raise typer.Exit(run(recordings, folder, streams, _console(), json=json, page=report))


@app.command(
    examples=[
        "instep export today.instep",
        "instep export today.instep --output mics.csv --streams 'mic-*'",
    ]
)
def export(
    recording: Recording,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The new file: .parquet, .npz, .csv or .mcap. Default: .parquet next to the recording.",
            show_default=False,
        ),
    ] = None,
    streams: Streams = [],  # noqa: B006
) -> None:
    """Write a recording's frames and outputs as one table, for other tools.

    `instep send` reads every format. Exit status 0: the file was written. 2: nothing was written.
    """
    from instep.export.command import Export, run

    interrupts.raise_stopped()
    run(Export(recording, output, streams), _console())


@app.command(examples=["instep demo", "instep demo --keep"])
def demo(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the picture and the recording.")] = Path(
        "demo-out"
    ),
    *,
    keep: Annotated[bool, typer.Option("--keep", help="Keep streaming until Ctrl-C, to watch the dashboard.")] = (
        False
    ),
) -> None:
    """Run the end-to-end demo: stream recorded speech, draw a picture, verify every output."""
    from instep.demo.speakers import run as run_speakers

    interrupts.raise_stopped()
    raise typer.Exit(run_speakers(output, _console(), keep=keep))


@app.command(
    "doctor",
    examples=["instep doctor my-model", "instep doctor --config instep.yaml --json", "instep doctor --settings"],
)
@partial(takes_settings, without=("demo", "endpoint", "http", "device", "verify_live"))  # --set gives the others
def doctor_command(
    given: Given,
    *,
    settings_shown: Annotated[
        bool, typer.Option("--settings", help="Only show every setting, and where its value came from.")
    ] = False,
    json: Json = False,
) -> None:
    """Diagnose this machine and configuration.

    Prints versions, machine, model and disk, and warnings with their cures. Takes the options of `instep serve`, and
    compiles the demo's model if none is named. Exit status 0: a server could start. 1: it could not.
    """
    interrupts.raise_stopped()
    if settings_shown:
        from instep.config import explain_config

        loaded, sources = explain_config(given.file, given.flags)
        shown = {
            (path := f"{section}.{key}"): {"value": value, "source": sources[path]}
            for section, keys in loaded.model_dump(mode="json").items()
            for key, value in keys.items()
        }
        lines = (f"{path:<31} {jsonlib.dumps(each['value']):<23} {each['source']}" for path, each in shown.items())
        typer.echo(jsonlib.dumps(shown, indent=2) if json else "\n".join(lines))
        return
    from instep.demo import MODEL_FOLDER
    from instep.doctor import doctor

    raise typer.Exit(doctor(given.file, given.flags, MODEL_FOLDER, json, typer.echo))


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def _logged(log: LogConfig | None) -> Iterator[None]:
    """If the block fails, also write the reason into a log that is a file or JSON."""
    try:
        yield
    except users_errors() as error:
        from instep.server.log import make_log

        if log is not None and (log.format == "json" or log.file is not None):
            make_log(log).error("cannot serve", reasons=str(error).splitlines())
            if log.file is None:
                raise typer.Exit(2) from error
        raise


def users_errors() -> tuple[type[Exception], ...]:
    """The exceptions that are reported as a sentence, of the modules loaded so far."""
    return tuple(getattr(sys.modules[module], name) for module, name in _USERS_ERRORS.items() if module in sys.modules)
