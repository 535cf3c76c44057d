"""`instep serve --shards N`: one server for each shard and an admin server for all, under one command."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from instep.config import Config
from instep.config.endpoint import host_and_port
from instep.frontends.http.security import UNIX
from instep.frontends.shards import Shard, for_table
from instep.recording.database import SUFFIX
from instep.runtime.executor import usable_cores
from instep.server.checks import CannotServe, Finding, before_loading, other_shards, settle, with_all_streams
from instep.server.recording_files import SHARDS_FILE, shards_in
from instep_client.protocol.wire import ShardTable

_LAST_PORT: Final = 65_535


def config_of_shard(config: Config, number: int, admin: Path | None = None) -> Config:
    """The configuration of one of several servers under one command: port + number, and a folder for recordings.

    Its admin server, if there is to be one, is at a Unix socket in the folder `admin`.
    """
    endpoint, file, http = config.transport.endpoint, config.recording.file, config.http
    place, _, port = endpoint.rpartition(":")
    has_port = endpoint.startswith("tcp:") and port.isdecimal()  # after a reload it may have none
    own = f"{place}:{int(port) + number}" if has_port else f"{endpoint}.{number}"
    if admin is not None and http.endpoint is not None:
        http = http.model_copy(update={"endpoint": f"{UNIX}{admin / str(number)}", "token_file": None})
    return config.model_copy(
        update={
            "http": http,
            "transport": config.transport.model_copy(update={"endpoint": own}),
            "recording": config.recording.model_copy(update={"file": file and file / f"shard-{number}"}),
        }
    )


def findings(config: Config, shards: int) -> Iterator[Finding]:
    """Check everything that needs no loaded model, as `before_loading` does for one server."""
    if (problem := _contradiction(config, shards)) is not None:
        yield problem
        return
    folder, cores = config.recording.file, usable_cores()
    if shards > cores:
        yield Finding("warning", f"{shards} shards share {cores} cores", "use at most one shard for each core")
    found: dict[Finding, list[int]] = {}
    for number in range(shards):
        own = config_of_shard(config, number)
        if folder is not None:  # which `claim` makes, and those of shards
            there = next(each for each in (folder / f"shard-{number}", folder, folder.parent) if each.is_dir())
            own = own.model_copy(update={"recording": config.recording.model_copy(update={"file": there})})
        for finding in before_loading(own, restart=True, shards=shards):
            found.setdefault(finding, []).append(number)
    for finding, numbers in found.items():
        where = "" if len(numbers) == shards else f"shard {', '.join(map(str, numbers))}: "
        yield finding._replace(what=where + finding.what)


def _contradiction(config: Config, shards: int) -> Finding | None:
    """What is wrong with the endpoint or the folder for this number of shards, if anything."""
    endpoint, folder = config.transport.endpoint, config.recording.file
    port, http = endpoint.rpartition(":")[2], config.http.endpoint
    is_tcp = endpoint.startswith("tcp:")
    ports = range(int(port), int(port) + shards) if is_tcp and port.isdecimal() else range(0)
    if is_tcp and not (ports and ports[-1] <= _LAST_PORT):
        what, cure = f"--shards needs another port than that of {endpoint}", "shard K listens at the port + K"
    elif http is not None and host_and_port(http)[1] in ports:
        what, cure = f"http.endpoint {http} has the port of a shard", "choose another one (--http 127.0.0.1:PORT)"
    elif folder is None:
        return None
    elif folder.suffix == SUFFIX or not (folder if folder.exists() else folder.parent).is_dir():
        what, cure = f"recording.file {folder} is not a folder", "each shard records into a folder in it: name one"
    elif others := list(other_shards(folder, shards)):
        return others[0]
    elif lone := next(folder.glob(f"*{SUFFIX}"), None):
        what, cure = f"{lone} is of a server without shards", "its streams would not be found: name another folder"
    else:
        return None
    return Finding("problem", what, cure)


def rehearse(config: Config, shards: int, log: structlog.stdlib.BoundLogger) -> None:
    """Check that all shards could start, as `checks.rehearse` does for one server.

    Raises:
        CannotServe: when one could not.
    """
    from instep.server.checks import rehearse_server
    from instep.server.preparation import prepare

    settle(findings(config, shards), log)
    prepared = prepare(config, log, restart=True)
    settle(with_all_streams(config, prepared, shards), log)
    for number in range(shards):
        own = config_of_shard(config, number)
        if own.recording.file is not None and not own.recording.file.is_dir():  # nothing is recorded yet
            own = own.model_copy(update={"recording": own.recording.model_copy(update={"file": None})})
        rehearse_server(own, prepared, log.bind(shard=number))


def run(config: Config, shards: int, *, reread: Callable[[], Config], steps_apart: bool | None = None) -> int:
    """Serve all shards until interrupted, each in a child process that is started again when a signal kills it.

    Args:
        config: that of all.
        shards: their number.
        reread: reads the configuration again on SIGHUP, and raises ConfigError.
        steps_apart: whether steps get processes of their own; None to choose it by the device.

    Returns:
        In a child, as `serve.run`.

    Raises:
        CannotServe: when a server cannot start.
        SystemExit: in the parent of the children, with 0 if all ended with 0.
    """
    from instep.cluster.admin import serve_admin
    from instep.server.serve import Kept, launching, serve_one
    from instep.server.supervisor import Child, supervise

    endpoints = tuple(for_table(config_of_shard(config, number).transport.endpoint) for number in range(shards))
    table = ShardTable(np.zeros(shards, np.uint64), endpoints)
    with launching(config, findings(config, shards), reread, supervised=True, servers=shards) as launch:
        if config.recording.file is not None:
            claim(config.recording.file, shards)
        kept = [Kept() for _ in range(shards)]
        children = [Child(number, f"shard {number}", launch.log.bind(shard=number)) for number in range(shards)]
        sockets = None
        if config.http.endpoint is not None:
            sockets = Path(tempfile.mkdtemp(prefix="instep-"))
            children.append(Child(shards, "the admin server", launch.log, is_helper=True))
        try:
            child = supervise(children, launch.service_manager.forget)
        except SystemExit:
            if sockets is not None:
                shutil.rmtree(sockets, ignore_errors=True)
            raise
        if child.is_helper and sockets is not None:
            return asyncio.run(serve_admin(config.http, lambda: range(shards), sockets, launch.log))
        launch = replace(
            launch,
            config=config_of_shard(config, child.number, sockets),
            log=child.log,
            reread=lambda: config_of_shard(reread(), child.number, sockets),
            shard=Shard(child.number, shards, table=table),
            steps_apart=steps_apart,
        )
        try:
            return serve_one(launch, kept[child.number], is_again=bool(child.deaths))
        except CannotServe as error:
            raise CannotServe(f"shard {child.number}: {error}") from None


def claim(folder: Path, shards: int) -> None:
    """Make the folders for the recordings of shards, and the file with their number."""
    try:
        for number in range(shards):
            (folder / f"shard-{number}").mkdir(exist_ok=True, parents=True)
        if shards_in(folder) != shards:
            (folder / SHARDS_FILE).write_text(f"{shards}\n")
    except OSError as error:
        raise CannotServe(f"recording.file {folder} cannot be written: {error.strerror}") from None
