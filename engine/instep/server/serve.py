"""Runs a server from a configuration, and returns its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import mmap
import os
import re
import shlex
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
import torch

from instep.config import Config, ConfigError, ModelConfig
from instep.core.compiled import are_cached
from instep.frontends import CannotListen
from instep.frontends.http.security import read_tokens
from instep.security.principals import KeysError, Principals
from instep.server.assembly import make_server
from instep.server.audit import Audit
from instep.server.checks import (
    allow_open_files,
    before_loading,
    files_kept_back,
    settle,
    with_all_streams,
)
from instep.server.log import Threshold, make_log
from instep.server.models import UNDER_WAY
from instep.server.preparation import CannotServe, Prepared, prepare
from instep.server.server import Server
from instep.server.supervisor import supervise
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep.streaming.warm_up import warm_up


class ServiceManager:
    """Notifies the service manager at $NOTIFY_SOCKET; without that variable it does nothing.

    Make it before the process forks, because the watchdog watches the process whose id is in $WATCHDOG_PID.
    """

    def __init__(self, environ: Mapping[str, str], log: structlog.stdlib.BoundLogger) -> None:
        self._log = log
        self._is_lost = False
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @ is systemd's for abstract ones
        self._ping_every_s = 0.0
        """Half of the watchdog's timeout; 0 without a watchdog."""
        if self._address and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._ping_every_s = int(environ.get("WATCHDOG_USEC", "0")) / 2e6

    def serving(self, status: str) -> None:
        """Report that the server accepts connections; `systemctl status` shows the text.

        From here on the event loop pings the watchdog as long as it runs.
        """
        self._tell(f"READY=1\nSTATUS={status}")
        self._ping()

    def stopping(self) -> None:
        """Report that the server drains."""
        self._tell("STOPPING=1\nSTATUS=draining")

    def _ping(self) -> None:
        if self._ping_every_s > 0:
            self._tell("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._ping_every_s, self._ping)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.setblocking(False)
                manager.sendto(state.encode(), self._address)
        except OSError as error:
            if not self._is_lost:
                self._log.warning("service manager not reached", reason=f"NOTIFY_SOCKET: {error.strerror or error}")
            self._is_lost = True


CHANGEABLE: Final = (
    "model.on_reload",
    "model.allow_other_sizes",
    "limits.max_idle_s",
    "limits.park_s",
    "limits.max_parked_streams",
    "limits.hibernate_after_s",
    "recording.warn_free_bytes",
    "shutdown.drain_timeout_s",
    "log.level",
    "log.summary_s",
)
"""Keys that a reload changes. All others are used once, at the start: to allocate memory, bind the socket, open the
recording.
"""
MODELS: Final = ("model.folder",)
"""Keys that a reload changes with a delay: see `Loader.reload`."""

_KEPT_BYTES: Final = 2**20


class Kept:
    """The values of the newest reload, kept for the next server if a signal kills this one.

    They are in memory that all processes forked after its creation share.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1 + 2 * _KEPT_BYTES)
        """Two halves, and the index of the valid one, so that a process that dies while writing leaves the other
        intact.
        """

    def keep(self, server: Server) -> None:
        """Store the changeable values in force, the versions of models, and reasons why others are not in force."""
        half, config, loader = 1 - self._shared[0], server.config, server.loader
        models = config.model.model_dump(mode="json")
        values = [_changeable(config), models, loader.fingerprints, server.unread, loader.problem]
        self._half(half)[:] = json.dumps(values).encode().ljust(_KEPT_BYTES)
        self._shared[0] = half

    def laid_over(self, config: Config) -> tuple[Config, dict[str, str], str, str]:
        """Return a configuration with the kept values, and the kept models' fingerprints, if any.

        The last two are `Server.unread` and `Loader.problem`: why the values in the file are not in force.
        """
        text = bytes(self._half(self._shared[0])).strip(b"\0")
        if not text:
            return config, {}, "", ""
        values, models, fingerprints, unread, problem = json.loads(text)
        config = _with_values(config, values).model_copy(update={"model": ModelConfig.model_validate(models)})
        if problem == UNDER_WAY:
            problem = "models are as before the last reload, during which the server was killed: reload again"
        return config, fingerprints, unread, problem

    def _half(self, half: int) -> memoryview:
        return memoryview(self._shared)[1:][half * _KEPT_BYTES :][:_KEPT_BYTES]


async def reload(
    server: Server,
    reread: Callable[[], Config],
    threshold: Threshold,
    log: structlog.stdlib.BoundLogger,
    kept: Kept,
) -> None:
    """Read the configuration again and apply the changeable keys; a broken one changes nothing.

    Files are read in a thread, because their disk may be slow. One reload may be under way at a time.

    The changes are logged at any level, also those of models, which are under way; their success is logged later.
    `reread` raises ConfigError. `kept` gets the new values, and the models once they are accepted.
    """
    running, level = server.config, threshold.level
    threshold.level = "info"  # whoever sent the signal is told what came of it
    try:
        wanted, tokens = await in_daemon_thread(lambda: (reread(), read_tokens(running.http)), "instep-reload")
        models = {"model": server.loader.config}
        under_way = [text for path, text in differences(running.model_copy(update=models), wanted) if path in MODELS]
        server.configure(_with_values(running, _changeable(wanted)))
        if server.admin is not None:
            server.admin.admit(tokens)
            if tokens is not None:
                log.info("tokens reloaded", tokens=len(tokens))
        server.loader.reload(wanted.model, lambda: kept.keep(server))
        level = wanted.log.level
        changed = dict(differences(running, wanted))
        left = [path for path in changed if path not in (*CHANGEABLE, *MODELS)]
        server.unread = f"read at the start only, and changed since: {', '.join(left)}" if left else ""
        kept.keep(server)
        also = {"under_way": under_way} if under_way else {}
        log.info("reloaded", changed=[changed[path] for path in changed if path in CHANGEABLE], **also)
        if left:
            log.warning("restart needed", keys=left, reason="these have changed, and are read at the start only")
    except ConfigError as error:
        server.unread = "; ".join(map(str, error.problems))
        if server.loader.problem != UNDER_WAY:
            server.loader.problem = ""  # of what the file said before
        kept.keep(server)
        for problem in error.problems:
            log.error("not reloaded", reason=str(problem))
    except CannotListen as error:
        server.unread = str(error)
        kept.keep(server)
        log.error("not reloaded", reason=server.unread)
    finally:
        threshold.level = level
    await _reload_peers(server, threshold, log)


async def _reload_peers(server: Server, threshold: Threshold, log: structlog.stdlib.BoundLogger) -> None:
    """Read the file of peers again; a broken one changes nothing."""
    file = server.config.transport.peers_file
    if file is None:
        return
    level, threshold.level = threshold.level, "info"
    try:
        principals = await in_daemon_thread(partial(Principals.read, file), "instep-reload")
        log.info("peers reloaded", peers=len(principals.by_name), connections_ended=server.admit(principals))
        _warn_of_peers(server, log)
    except KeysError as error:
        problem = "transport.peers_file was not reloaded: see the log"  # whoever asks /readyz needs no token
        server.unread = "; ".join(filter(None, (server.unread, problem)))
        for problem in error.problems:
            log.error("peers not reloaded", reason=problem)
    finally:
        threshold.level = level


def differences(one: Config, other: Config) -> Iterator[tuple[str, str]]:
    """The keys whose values differ, each with a text that shows both values."""
    for (path, before), (_, after) in zip(_values(one), _values(other), strict=True):
        if before != after:
            yield path, f"{path}: {_in_words(before)} → {_in_words(after)}"


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {each}' for name, each in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    for path, value in values.items():
        name, key = path.split(".")
        config = config.model_copy(update={name: getattr(config, name).model_copy(update={key: value})})
    return config


def _changeable(config: Config) -> dict[str, Any]:
    return {path: value for path, value in _values(config) if path in CHANGEABLE}


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{key}", value) for name, section in config for key, value in section)


@dataclass(frozen=True, slots=True)
class _Start:
    """Options of a start in addition to the configuration."""

    reread: Callable[[], Config]
    on_ready: Callable[[str], None]
    kept: Kept
    service_manager: ServiceManager
    is_supervised: bool
    has_terminal: bool


def run(
    config: Config,
    *,
    reread: Callable[[], Config] | None = None,
    on_ready: Callable[[str], None] = lambda endpoint: None,
    restart: bool = False,
) -> int:
    """Serve until interrupted.

    Args:
        config: the configuration.
        reread: reads the configuration again on SIGHUP, and raises ConfigError. None to keep the same one.
        on_ready: called with the endpoint once the server answers.
        restart: whether to serve in a child process that is started again when a signal kills it or its stepping
            process.

    Returns:
        0 after a clean shutdown, 1 after a failure while serving, 130 if a second interrupt forced the end.

    Raises:
        CannotServe: when the server cannot start.
        SystemExit: in the parent of the child, with the child's status.
    """
    threshold = Threshold(config.log.level)
    audit = Audit(config.audit.file) if config.audit.file is not None else None
    log = make_log(config.log, threshold, audit)
    if audit is not None:
        audit.log = log
    settle(before_loading(config, restart=restart), log)
    prepared = prepare(config, log, restart=restart)
    settle(with_all_streams(config, prepared), log)
    if not are_cached("instep.core."):
        log.info("compiling", hint="once on a machine, up to half a minute")
    warm_up()
    gc.freeze()  # what is loaded by now stays: collections need not look at it again
    manager = ServiceManager(os.environ, log)
    start = _Start(reread or (lambda: config), on_ready, Kept(), manager, restart, _has_terminal())
    try:
        if restart and supervise(log):
            return _serve_again(config, prepared, log, threshold, start)
        return asyncio.run(_serve(config, prepared, log, threshold, start))
    finally:
        if audit is not None:
            audit.close()


def _serve_again(
    at_start: Config,
    loaded: Sequence[Prepared],
    log: structlog.stdlib.BoundLogger,
    threshold: Threshold,
    start: _Start,
) -> int:
    """Serve the models that were in force when the last server died or, if that fails, those of the start."""
    config, fingerprints, unread, problem = start.kept.laid_over(at_start)
    threshold.level = config.log.level
    if changed := [change for _, change in differences(at_start, config)]:
        log.info("reload kept", changed=changed)
    if unread:
        log.error("not reloaded", reason=unread)
    have = {each.model.name: each.model.fingerprint for each in loaded}
    if config.model.folder != at_start.model.folder or (fingerprints or have) != have:
        try:
            prepared = prepare(config, log, restart=True)
            return asyncio.run(_serve(config, prepared, log, threshold, start, unread, problem))
        except CannotServe as error:
            problem = f"models are as at the start: {error}"
            config = _with_values(at_start, _changeable(config))
    return asyncio.run(_serve(config, loaded, log, threshold, start, unread, problem))


async def _serve(
    config: Config,
    prepared: Sequence[Prepared],
    log: structlog.stdlib.BoundLogger,
    threshold: Threshold,
    start: _Start,
    unread: str = "",
    problem: str = "",
) -> int:
    allow_open_files(config.limits.max_connections + files_kept_back(config))
    server = make_server(config, prepared, log)
    server.unread, server.loader.problem = unread, problem
    if problem:
        log.error("models not reloaded", reason=problem)
    log.debug("configuration", **config.model_dump(mode="json"))
    stops = 0
    reloads, turn = Tasks(lambda error: log.error("bug in a reload", exc_info=error)), asyncio.Lock()

    async def reload_in_turn() -> None:
        async with turn:
            await reload(server, start.reread, threshold, log, start.kept)

    def stop() -> None:
        nonlocal stops
        stops += 1
        if stops == 1:
            log.info("stopping", hint="finishing what was admitted; interrupt again to force")
            start.service_manager.stopping()
        server.stop(drain=stops == 1)

    def hung_up() -> None:
        if stops:
            return  # it ends already, and this is no reason to force it
        if start.has_terminal and not _has_terminal():
            stop()
        else:
            reloads.start(reload_in_turn())

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    for number, call in ((signal.SIGTERM, stop), (signal.SIGHUP, hung_up)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            loop.add_signal_handler(number, call)
    _say_what_is_served(server, prepared, log)
    start.service_manager.serving(f"serving {', '.join(each.model.name for each in prepared)} at {server.endpoint}")
    start.on_ready(server.endpoint)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    with torch.inference_mode():  # of the loop's thread, once: each short run would be longer by it
        await server.serve()
    stats = [service.engine.stats for service in server.services]
    log.info(
        "stopped",
        frames=sum(each.frames_total for each in stats),
        batches=sum(each.batches_total for each in stats),
        messages_unanswered=server.unanswered_messages,
    )
    if server.was_crash and start.is_supervised and not stops:
        os.kill(os.getpid(), signal.SIGKILL)  # the supervisor starts the next server only after a death by a signal
    if server.failure is not None:
        return 1
    return 130 if stops > 1 else 0


def _has_terminal() -> bool:
    """Whether there is a controlling terminal; the system removes it when the terminal closes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _say_what_is_served(server: Server, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger) -> None:
    for each in prepared:
        log.info(
            "ready",
            model=each.model.name,
            fingerprint=each.model.fingerprint[:8],
            device=str(each.device),
            exactness=each.exactness,
            max_streams=server.config.engine.max_streams,
        )
    admin = {} if server.admin is None else {"http": server.admin.url}
    endpoint = re.sub(r"//(0\.0\.0\.0|\*|\[::\]):", "//127.0.0.1:", server.endpoint)
    asks, keys = f"ping -e {shlex.quote(endpoint)}", {}
    if server.principals is not None and (key_file := server.config.transport.key_file) is not None:
        keys = {"keys": "on", "peers": len(server.principals.by_name)}
        asks = f"--key-file NAME.key_secret --server-key {shlex.quote(str(key_file.with_suffix('.key')))} {asks}"
    log.info("serving", endpoint=server.endpoint, **admin, **keys, next=f"instep-client {asks}")
    _warn_of_peers(server, log)


def _warn_of_peers(server: Server, log: structlog.stdlib.BoundLogger) -> None:
    if server.principals is None:
        return
    peers = server.principals.by_name.values()
    if not peers:
        log.warning("nobody may connect", reason="transport.peers_file names nobody", next="instep keys new NAME")
    served = {each.service.name for each in server.models}
    if unknown := {model for each in peers for model in each.models or ()} - served:
        log.warning("peers may use models that are not served", models=sorted(unknown))
