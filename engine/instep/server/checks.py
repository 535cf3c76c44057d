"""Checks of a configuration and of the machine, for a start, `serve --check` and `doctor`.

Loading PyTorch and models takes up to a minute, so nothing here may import PyTorch before `rehearse`.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import structlog

from instep.config import Config
from instep.config.endpoint import host_and_port
from instep.core.tables import STREAM
from instep.frontends import CannotListen
from instep.frontends.http.security import DEFAULT, cannot_listen, read_tokens
from instep.memory import read_text, size, usable_memory
from instep.models.errors import no_folder
from instep.recording.database import SUFFIX, check_file, check_place, lost_tail
from instep.recording.errors import RecordingError, with_advice
from instep.recording.lock import check_not_written
from instep.runtime.executor import usable_cores
from instep.security.authenticator import MAX_FILES
from instep.security.keys import ServerKeys
from instep.server.recording_files import check_folder, nearest_folder, shards_in
from instep_client.protocol.errors import InvalidInput

if TYPE_CHECKING:
    from instep.server.preparation import Prepared

MAX_BUFFERED_BYTES: Final = 256 * 1024 * 1024
"""The limit of unread replies, for all connections together."""
_FILES_BESIDE_CONNECTIONS: Final = 100
"""The approximate number of files that a server opens in addition to one for each connection."""
_LAST_PORT: Final = 65_535
_NETWORK: Final = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.s3fs")


class CannotServe(Exception):
    """The server cannot start; the message names the cause and the cure."""


class Finding(NamedTuple):
    """A result of a check."""

    severity: Literal["problem", "warning"]
    """A problem prevents the start; a warning does not."""
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}" if self.cure else self.what


def before_loading(config: Config, *, restart: bool = False, shards: int = 1, copies: int = 0) -> Iterator[Finding]:
    """Check everything that needs no loaded model, without writing anything; `restart` is as in `serve.run`.

    Copies have the ports after those of the shards.
    """
    if problems := list(_shards(config, shards, copies)):
        yield from problems
        return
    for check in (_folders, _recording, _audit, _secrets, _disk, _cores, _open_files):
        yield from check(config)
    yield from _ports(config, shards)
    if restart and config.transport.endpoint.endswith(":*"):
        sentence = "--restart needs a port"
        yield Finding("problem", sentence, "clients would not find the next server on whichever port is free then")
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        what = "NUMBA_DISABLE_JIT is set, so the hot path runs as ordinary Python, some hundred times as slow"
        yield Finding("warning", what, "unset it")


def check_before_loading(
    config: Config, log: structlog.stdlib.BoundLogger, *, restart: bool = False, shards: int = 1
) -> None:
    """Report what `before_loading` finds, and log the models that are to be loaded.

    Raises:
        CannotServe: with a line for every problem.
    """
    report(before_loading(config, restart=restart, shards=shards), log)
    for _, folder in config.model.folders:
        log.info("loading", model=str(folder))


def report(findings: Iterable[Finding], log: structlog.stdlib.BoundLogger) -> None:
    """Log the warnings.

    Raises:
        CannotServe: with a line for every problem.
    """
    problems = []
    for finding in findings:
        if finding.severity == "problem":
            problems.append(str(finding))
        else:
            log.warning("will hurt", reason=finding.what, next=finding.cure)
    if problems:
        raise CannotServe("\n".join(problems))


def with_all_streams(config: Config, prepared: Sequence[Prepared], servers: int = 1) -> Iterator[Finding]:
    """Compare memory with the tables of this number of servers, and with all streams that they may have."""
    needed, usable = servers * memory_when_full(config, prepared), usable_memory()
    if (empty := servers * len(prepared) * config.engine.max_streams * STREAM.itemsize) > usable:
        what = f"engine.max_streams is {config.engine.max_streams:,}, and takes {size(empty)} of {size(usable)} at once"
        yield Finding("problem", what, "lower it")
    elif needed > usable:
        what = f"the limits allow {size(needed)}, and {size(usable)} of memory may be used"
        cure = "lower engine.max_streams or limits.window_frames: the server is killed before it reaches them"
        yield Finding("warning", what, cure)


def memory_when_full(config: Config, prepared: Sequence[Prepared]) -> int:
    """The bytes in use with all streams open: states on the CPU, frame buffers, and unread replies."""
    needed = MAX_BUFFERED_BYTES
    for each in prepared:
        description = each.network.description
        frame = 4 * (description.features + description.outputs) + 4
        state = each.network.state.row_bytes if each.device.type == "cpu" else 0  # else it is in the device's memory
        needed += config.engine.max_streams * (state + config.limits.window_frames * frame)
    return needed


def rehearse(config: Config, log: structlog.stdlib.BoundLogger, *, restart: bool = False, shards: int = 1) -> None:
    """Load and compile the models, read their recordings as far as a start does, and try the endpoints.

    Nothing is written; the log lists the models that would be served. `restart` is as in `serve.run`.

    Raises:
        CannotServe: when the server could not start.
    """
    from instep.server.preparation import prepare

    check_before_loading(config, log, restart=restart, shards=shards)
    prepared = prepare(config, log, restart=restart)
    report(with_all_streams(config, prepared, shards), log)
    numbers = range(shards) if shards > 1 else ()
    for own, its_log in [(config.of_shard(each), log.bind(shard=each)) for each in numbers] or [(config, log)]:
        _rehearse_server(own, prepared, its_log)


def _rehearse_server(config: Config, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger) -> None:
    from instep.frontends.http.admin import bind
    from instep.frontends.zmq.router import Router
    from instep.server.preparation import log_of
    from instep.server.services import effective_limits
    from instep.server.versions import find_recording

    is_only = len(prepared) == 1
    try:
        for each in prepared:
            description = each.network.description
            effective_limits(config, description.features, description.outputs)
            of_model = log_of(each.model.name, log, is_only=is_only)
            if (versions := find_recording(config, each, of_model)) is not None:
                _look_through(versions.file, config, each, of_model)
        Router(config.transport, ServerKeys.read(config.transport)).close()
        if (listener := bind(config.http, log)) is not None:
            listener.close()
    except (CannotListen, InvalidInput, RecordingError) as error:
        raise CannotServe(with_advice(error)) from None
    admin = {} if listener is None else {"http": _with_port(f"http://{config.http.endpoint}")}
    for each in prepared:
        log.info(
            "can serve",
            endpoint=_with_port(config.transport.endpoint),
            **admin,
            model=each.model.name,
            device=str(each.device),
            exactness=each.exactness,
            max_streams=config.engine.max_streams,
        )


def files_kept_back(config: Config) -> int:
    """Descriptors that connections with HELLO may not take: for files, HTTP, and connections without HELLO."""
    return _FILES_BESIDE_CONNECTIONS + (MAX_FILES if config.transport.key_file is not None else 0)


def max_connections(config: Config) -> int:
    """Connections that may say HELLO: fewer than configured where the hard limit of open files is low."""
    hard = _file_limits()[1]
    if hard == resource.RLIM_INFINITY:
        return config.limits.max_connections
    return min(config.limits.max_connections, max(hard // 2, hard - files_kept_back(config)))


def allow_open_files(wanted: int) -> int:
    """Raise this process's soft limit of open files to `wanted`, as far as the hard limit allows.

    Returns:
        The new limit.
    """
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in _file_limits())
    if soft >= min(wanted, hard):
        return soft
    allowed = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, _file_limits()[1]))
    return allowed


def _file_limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _shards(config: Config, shards: int, copies: int) -> Iterator[Finding]:
    """Check that endpoint and folder fit this number of shards. If they do not, nothing else can be checked."""
    endpoint, http, folder = config.transport.endpoint, config.http.endpoint, config.recording.path
    recorded = 0 if folder is None else shards_in(folder)
    if folder is not None and (copies or recorded == 1 < shards) and any(folder.glob(f"*{SUFFIX}")):
        what = f"{folder} has the recording of a server without shards"
        yield Finding("problem", what, "its streams would not be served: name another folder")
    elif recorded not in (0, shards):
        what = f"the recordings in {folder} are of {recorded} shards, not {shards}"
        yield Finding("problem", what, "a stream would be looked for in the wrong one")
    if shards + copies == 1:
        return
    if config.recording.is_one_file:
        what = f"recording.path {folder} is one file"
        yield Finding("problem", what, "each shard has its own: name a folder, which is made")
    if endpoint.startswith("tcp:"):
        port = endpoint.rpartition(":")[2]
        count = shards + copies
        ports = range(int(port), int(port) + count) if port.isdecimal() else range(0)
        if not ports or ports[-1] > _LAST_PORT:
            what = f"{endpoint} is the first of {count} endpoints, which need ports in a row"
            yield Finding("problem", what, f"shard K listens at the port + K, and the last port is {_LAST_PORT}")
        if http is not None and host_and_port(http)[1] in ports:
            what = f"http.endpoint {http} has the port of a {'shard or copy' if copies else 'shard'}"
            yield Finding("problem", what, "choose another one (--http 127.0.0.1:PORT)")


def _folders(config: Config) -> Iterator[Finding]:
    for _, folder in config.model.folders:
        if problem := no_folder(folder):
            yield Finding("problem", *problem)


def _recording(config: Config) -> Iterator[Finding]:
    place = config.recording.path
    if place is None:
        return
    folders = [folder for _, folder in config.model.folders]
    around = [os.path.realpath(place), *map(str, Path(os.path.realpath(place)).parents)]
    if inside := [folder for folder in folders if os.path.realpath(folder) in around]:
        what = f"recording.path {place} is in the model folder {inside[0]}"
        yield Finding("problem", what, "name a place outside it for the recording")
        return
    try:
        if config.recording.is_one_file:
            check_place(place)
            check_file(place)
        else:
            check_folder(place)
    except RecordingError as error:
        yield Finding("problem", with_advice(error), "")


def _audit(config: Config) -> Iterator[Finding]:
    file = config.audit.file
    if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        yield Finding("problem", f"audit.file {file} cannot be written", "name a file where this user may write")


def _ports(config: Config, shards: int) -> Iterator[Finding]:
    http = config.http.endpoint
    for number in range(shards):
        endpoint = config.of_shard(number).transport.endpoint
        if endpoint.startswith("tcp://") and _is_in_use(endpoint.removeprefix("tcp://")):
            place, _, port = endpoint.rpartition(":")
            what = f"cannot bind {endpoint}: {os.strerror(errno.EADDRINUSE)}"
            cure = f"end the server that uses it, or choose another: --endpoint {place}:{int(port) + shards}"
            yield Finding("problem", what if shards == 1 else f"shard {number}: {what}", cure)
    if http not in (None, DEFAULT) and _is_in_use(http):
        error = cannot_listen(http, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))
        yield Finding("problem", str(error), "")


def _is_in_use(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:  # of a name, as ZeroMQ does
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]*"), int(port) if port.isdecimal() else 0))
        except OSError as error:  # whatever else is wrong with it, the bind says
            return error.errno == errno.EADDRINUSE
    return False


def _secrets(config: Config) -> Iterator[Finding]:
    for read in (lambda: ServerKeys.read(config.transport), lambda: read_tokens(config.http)):
        try:
            read()
        except InvalidInput as error:
            yield Finding("problem", str(error), "")


def _disk(config: Config) -> Iterator[Finding]:
    if config.recording.path is None:
        return
    folder = nearest_folder(config.recording.path)
    kind = _file_system(folder)
    if kind.startswith(_NETWORK):
        what = f"the recording is on a network file system ({kind}), where SQLite's WAL can be damaged"
        cure = (
            "put recording.path on a local disk, and copy finished recordings: instep recordings cut FILE --output COPY"
        )
        yield Finding("warning", what, cure)
    free = os.statvfs(folder)
    if (free_bytes := free.f_bavail * free.f_frsize) < config.recording.warn_free_bytes:
        what = f"{size(free_bytes)} are free for the recording, and a full disk ends the server"
        yield Finding("warning", what, "make room, or bound the recording with recording.keep_bytes")


def _file_system(folder: Path) -> str:
    """The kernel's name for the type of a folder's file system; empty if it is not known."""
    lines = read_text(Path("/proc/self/mounts")).splitlines()
    mounts = ((point.replace("\\040", " "), kind) for _, point, kind, *_ in map(str.split, reversed(lines)))
    around = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(around, key=lambda each: each[0], default=(0, ""))[1]


def _cores(config: Config) -> Iterator[Finding]:
    cores, processes = usable_cores(), 1 + max(1, len(config.model.folders))
    if cores < 2:
        what = "this process may use one core only, which the event loop and the steps share"
        yield Finding("warning", what, "give it two or more: by its affinity (taskset), or the limit of its container")
    elif processes > cores and not config.engine.device.startswith("cuda"):
        what = f"{processes} processes, the server's and one for the steps of each model, share {cores} cores"
        yield Finding("warning", what, "give it more cores, or serve fewer models from this machine")


def _open_files(config: Config) -> Iterator[Finding]:
    hard, needed = _file_limits()[1], config.limits.max_connections + files_kept_back(config)
    if hard != resource.RLIM_INFINITY and hard < needed:
        what = (
            f"{hard:,} files may be open, and limits.max_connections of {config.limits.max_connections:,} needs "
            f"{needed:,}, so later connections will be refused"
        )
        cure = f"raise the hard limit (ulimit -Hn, LimitNOFILE={needed} in a unit), or lower limits.max_connections"
        yield Finding("warning", what, cure)


def _look_through(path: Path, config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> None:
    from instep.recording.reader import RecordingReader
    from instep.recording.records import refuse_other_model
    from instep.replay.recovery import look_through
    from instep.server.recordings import recording_header

    if not os.access(path if path.exists() else nearest_folder(path), os.W_OK):
        raise RecordingError(f"{path} cannot be written: give this user the right to, or name another file")
    if not path.is_file() or not path.stat().st_size:
        log.info("would record", file=str(path), durability=config.recording.durability)
        return
    check_not_written(path)
    if tail := lost_tail(path):
        log.warning("recording lost its end", file=str(path), reason=tail)
    with RecordingReader(path) as reader:
        refuse_other_model(path, reader.engines[-1].header, recording_header(prepared, config))
    streams, frames = look_through(path)
    log.info("would continue", file=str(path), streams=streams, frames_to_replay=frames)


def _with_port(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    return f"{host}:PORT, a free one" if port in ("0", "*") else endpoint
