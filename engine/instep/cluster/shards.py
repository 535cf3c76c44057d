"""`instep serve --shards N`: one server for each shard and an admin server for all, under one command."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from instep.cluster.admin import serve_admin
from instep.config import Config
from instep.frontends.shards import Shard, for_table
from instep.server.checks import CannotServe
from instep.server.recording_files import SHARDS_FILE, shards_in
from instep.server.serve import Kept, launching, serve_one
from instep.server.supervisor import Child, supervise
from instep_client.protocol.wire import ShardTable


def run(config: Config, shards: int, *, reread: Callable[[], Config]) -> int:
    """Serve all shards until interrupted, each in a child process that is started again when a signal kills it.

    Args:
        config: that of all.
        shards: their number.
        reread: reads the configuration again on SIGHUP, and raises ConfigError.

    Returns:
        In a child, as `serve.run`.

    Raises:
        CannotServe: when a server cannot start.
        SystemExit: in the parent of the children, with 0 if all ended with 0.
    """
    endpoints = tuple(for_table(config.of_shard(number).transport.endpoint) for number in range(shards))
    table = ShardTable(np.zeros(shards, np.uint64), endpoints)
    with launching(config, reread, supervised=True, servers=shards) as launch, folder_of_sockets() as sockets:
        if config.recording.path is not None:
            claim(config.recording.path, shards)
        for number in range(shards):
            (sockets / str(number)).touch()  # the admin server shows those that do not listen yet, too
        kept = [Kept() for _ in range(shards)]
        children = [Child(number, f"shard {number}", launch.log.bind(shard=number)) for number in range(shards)]
        if config.http.endpoint is not None:
            children.append(Child(shards, "the admin server", launch.log, is_helper=True))
        child = supervise(children, launch.service_manager.forget)
        if child.is_helper:
            return asyncio.run(serve_admin(config.http, sockets, launch.log))
        shard = Shard(child.number, shards, table=table, admin=sockets / str(child.number))
        try:
            return serve_one(launch.of_shard(shard), kept[child.number])
        except CannotServe as error:
            raise CannotServe(f"shard {child.number}: {error}") from None


@contextmanager
def folder_of_sockets() -> Iterator[Path]:
    """A folder for the sockets of shards' admin servers, which no other user can enter.

    The process that made it removes it. If that was killed, those that it forked do; those of an agent are killed with
    it, and leave the folder.
    """
    maker, folder = os.getpid(), Path(tempfile.mkdtemp(prefix="instep-"))
    try:
        yield folder
    finally:
        if os.getppid() != maker:  # the maker itself, or a child whose parent, the maker, has ended
            shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path, shards: int) -> None:
    """Make the folders for the recordings of shards, and the file with their number."""
    try:
        for number in range(shards):
            (folder / f"shard-{number}").mkdir(exist_ok=True, parents=True)
        if shards_in(folder) != shards:
            (folder / SHARDS_FILE).write_text(f"{shards}\n")
    except OSError as error:
        raise CannotServe(f"recording.path {folder} cannot be written: {error.strerror}") from None
