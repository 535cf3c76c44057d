"""Checks of a start that need neither PyTorch nor a model: loading those takes up to a minute.

Nothing here may import PyTorch, not even by way of another module.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from instep.config import Config
from instep.frontends import CannotListen
from instep.frontends.http.security import DEFAULT, cannot_listen, read_token
from instep.memory import size, usable_memory
from instep.models.errors import no_folder
from instep.recording.database import check_file, check_place
from instep.recording.errors import RecordingError, with_advice
from instep.server.memory import memory_at_start
from instep.server.recording_files import check_several


class CannotServe(Exception):
    """The server cannot start; the message says whose fault it is and what to do."""


def early_problems(config: Config, *, restart: bool = False) -> list[str]:
    """A sentence about everything that is known to stand in the way of a start; nothing is written.

    `restart` is as of `serve.run`.
    """
    checks = (_folders, _recording, _ports, _token, _memory)
    problems = [sentence for check in checks for sentence in check(config)]
    if restart and config.transport.endpoint.endswith(":*"):
        problems.append("--restart needs a port: clients would not find the next server on whichever port is free then")
    return problems


def _folders(config: Config) -> Iterator[str]:
    for _, folder in config.model.folders:
        if not os.path.exists(folder):  # Path's raises if its name is too long
            yield ": ".join(no_folder(folder))


def _recording(config: Config) -> Iterator[str]:
    place = config.recording.file
    if place is None:
        return
    folders = [folder for _, folder in config.model.folders]
    if os.path.realpath(place) in map(os.path.realpath, folders):
        yield f"{place} is a model folder: name another folder, or a file, for the recording"
        return
    around = list(map(str, Path(os.path.realpath(place)).parents))
    if inside := [folder for folder in folders if os.path.realpath(folder) in around]:
        yield f"{place} is inside the model folder {inside[0]}: name a place outside it for the recording"
        return
    try:
        check_several(place, is_only=len(folders) < 2)
        if not os.path.isdir(place):
            check_place(place)
            check_file(place)
    except RecordingError as error:
        yield with_advice(error)


def _ports(config: Config) -> Iterator[str]:
    """Ports that another program listens on."""
    endpoint, http = config.transport.endpoint, config.http.endpoint
    family = socket.AF_INET6 if "[" in endpoint else socket.AF_INET  # of a name, ZeroMQ takes the address of IPv4
    if endpoint.startswith("tcp://") and _is_in_use(endpoint.removeprefix("tcp://"), family):
        yield f"cannot bind {endpoint}: {os.strerror(errno.EADDRINUSE)}; is another server using it?"
    if http not in (None, DEFAULT) and _is_in_use(http):
        yield str(cannot_listen(http, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))))


def _is_in_use(address: str, family: int = socket.AF_UNSPEC) -> bool:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return False
    try:
        found = socket.getaddrinfo(
            host.strip("[]*") or None, int(port), family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:  # whatever else is wrong with it, the bind says
        return error.errno == errno.EADDRINUSE
    return False


def _token(config: Config) -> Iterator[str]:
    try:
        read_token(config.http)
    except CannotListen as error:
        yield str(error)


def _memory(config: Config) -> Iterator[str]:
    needed, usable = memory_at_start(config), usable_memory()
    if needed > usable:
        yield (
            f"engine.max_streams is {config.engine.max_streams:,}, which takes {size(needed)} of memory before any "
            f"stream is opened, and {size(usable)} may be used: lower it"
        )
