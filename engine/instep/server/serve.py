"""Runs a server from a configuration, and returns its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import mmap
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import structlog
import torch

from instep.config import Config, ConfigError, ModelConfig
from instep.core.compiled import are_cached
from instep.frontends.http.security import read_tokens
from instep.frontends.shards import Shard
from instep.security.principals import Principals
from instep.server.assembly import make_server
from instep.server.audit import Audit
from instep.server.checks import (
    allow_open_files,
    files_kept_back,
    report,
    with_all_streams,
)
from instep.server.loader import UNDER_WAY
from instep.server.log import Threshold, make_log
from instep.server.preparation import CannotServe, Prepared, prepare
from instep.server.server import Server
from instep.server.supervisor import Child, supervise
from instep.streaming.kernels import compile_kernels
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep_client.protocol.errors import InvalidInput


class ServiceManager:
    """Notifies the service manager at $NOTIFY_SOCKET; without that variable it does nothing.

    Make it before the process forks: the watchdog watches the process whose id is in $WATCHDOG_PID, and all servers
    that are forked later share it, so that it reports them as one service.
    """

    def __init__(self, environ: Mapping[str, str], log: structlog.stdlib.BoundLogger, servers: int = 1) -> None:
        self._log = log
        self._pinged_s = memoryview(mmap.mmap(-1, 8 * servers)).cast("d")
        """The time of each server's last ping: 0 until it serves, infinite once it is not waited for."""
        self._is_lost = False
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @ is systemd's for abstract ones
        self._ping_every_s = 0.0
        """Half of the watchdog's timeout; 0 without a watchdog."""
        if self._address and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._ping_every_s = int(environ.get("WATCHDOG_USEC", "0")) / 2e6

    def serving(self, status: str, number: int = 0) -> None:
        """Report that a server accepts connections, once all do; `systemctl status` shows the text.

        From here on the watchdog is pinged as long as the event loops of all servers run.
        """
        self._pinged_s[number] = time.monotonic()
        if all(self._pinged_s):
            self._tell(f"READY=1\nSTATUS={status}")
        self._ping(number)

    def forget(self, number: int) -> None:
        """Wait no more for a server, which has ended for good."""
        self._pinged_s[number] = math.inf
        if all(self._pinged_s):
            self._tell("READY=1")

    def stopping(self) -> None:
        """Report that the server drains."""
        self._tell("STOPPING=1\nSTATUS=draining")

    def _ping(self, number: int) -> None:
        if self._ping_every_s > 0:
            self._pinged_s[number] = now_s = time.monotonic()
            if now_s - min(self._pinged_s) < 2 * self._ping_every_s:
                self._tell("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._ping_every_s, self._ping, number)

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
    *("model.on_reload", "model.allow_other_sizes"),
    *("limits.max_idle_s", "limits.park_s", "limits.max_parked_streams", "limits.hibernate_after_s"),
    *("recording.warn_free_bytes", "shutdown.drain_timeout_s", "log.level", "log.summary_s"),
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
        config = config.with_values(values).model_copy(update={"model": ModelConfig.model_validate(models)})
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
        await _reload_peers(server, log)  # first, because revoked keys do not wait for a correct configuration
        wanted, tokens = await in_daemon_thread(lambda: (reread(), read_tokens(running.http)), "instep-reload")
        models = {"model": server.loader.config}
        under_way = [text for path, text in differences(running.model_copy(update=models), wanted) if path in MODELS]
        server.configure(running.with_values(_changeable(wanted)))
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
    except (ConfigError, InvalidInput) as error:
        problems = str(error).splitlines()
        server.unread = "; ".join(problems)
        if server.loader.problem != UNDER_WAY:
            server.loader.problem = ""  # of what the file said before
        kept.keep(server)
        for problem in problems:
            log.error("not reloaded", reason=problem)
    finally:
        threshold.level = level


async def _reload_peers(server: Server, log: structlog.stdlib.BoundLogger) -> None:
    """Read the file of peers again; a broken one changes nothing."""
    if (file := server.config.transport.peers_file) is None:
        return
    try:
        principals = await in_daemon_thread(partial(Principals.read, file), "instep-reload")
        log.info("peers reloaded", peers=len(principals.by_name), connections_ended=server.admit(principals))
        server.unread_peers = ""
    except InvalidInput as error:
        server.unread_peers = "transport.peers_file was not reloaded: see the log"  # /readyz shows it to everybody
        for problem in str(error).splitlines():
            log.error("peers not reloaded", reason=problem)


def differences(one: Config, other: Config) -> Iterator[tuple[str, str]]:
    """The keys whose values differ, each with a text that shows both values."""
    for (path, before), (_, after) in zip(_values(one), _values(other), strict=True):
        if before != after:
            yield path, f"{path}: {_in_words(before)} → {_in_words(after)}"


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {each}' for name, each in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _changeable(config: Config) -> dict[str, Any]:
    return {path: value for path, value in _values(config) if path in CHANGEABLE}


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{key}", value) for name, section in config for key, value in section)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that servers need of the process that has loaded their models and forks them."""

    config: Config
    prepared: Sequence[Prepared]
    log: structlog.stdlib.BoundLogger
    threshold: Threshold
    reread: Callable[[], Config]
    """Reads the configuration again on SIGHUP, and raises ConfigError."""
    service_manager: ServiceManager
    is_supervised: bool
    """Whether the server is started again when a signal kills it."""
    shard: Shard = field(default_factory=Shard)
    """The server's place in a cluster."""

    def of_shard(self, shard: Shard) -> Launch:
        """That of one of several servers."""
        return replace(
            self,
            config=self.config.of_shard(shard.number),
            log=self.log.bind(shard=shard.number),
            reread=lambda: self.reread().of_shard(shard.number),
            shard=shard,
        )

    def reloaded(self) -> Launch:
        """That of servers which begin after a reload; raises ConfigError."""
        return replace(self, config=self.config.with_values(_changeable(self.reread())))


@contextlib.contextmanager
def launching(
    config: Config,
    reread: Callable[[], Config] | None = None,
    *,
    supervised: bool,
    servers: int = 1,
) -> Iterator[Launch]:
    """Load and compile the models, and everything else that is done once before servers are forked.

    Args:
        config: the configuration.
        reread: reads the configuration again on SIGHUP; None to keep the same one.
        supervised: whether servers are started again when a signal kills them.
        servers: how many there will be.

    Raises:
        CannotServe: when they could not start.
    """
    threshold = Threshold(config.log.level)
    audit = Audit(config.audit.file)
    audit.log = log = make_log(config.log, threshold, audit)
    prepared = prepare(config, log, restart=supervised)
    report(with_all_streams(config, prepared, servers), log)
    if not are_cached("instep.core."):
        log.info("compiling", hint="once on a machine, up to half a minute")
    compile_kernels()
    gc.freeze()  # what is loaded by now stays: collections need not look at it again
    manager = ServiceManager(os.environ, log, servers)
    try:
        yield Launch(config, prepared, log, threshold, reread or (lambda: config), manager, supervised)
    finally:
        audit.close()


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
    with launching(config, reread, supervised=restart) as launch:
        kept = Kept()
        if restart:
            supervise([Child(0, "the server", launch.log)], launch.service_manager.forget)
        return serve_one(launch, kept, on_ready)


def serve_one(launch: Launch, kept: Kept, on_ready: Callable[[str], None] = lambda endpoint: None) -> int:
    """Serve in this process until interrupted.

    Args:
        launch: with the configuration and the log of this server.
        kept: the same in each process that serves this after another. The models are those that were in force at the
            end of the one before or, if that fails, those of the start.
        on_ready: called with the endpoint once the server answers.

    Returns:
        As `run`.

    Raises:
        CannotServe: when the server cannot start.
    """
    at_start, log = launch.config, launch.log
    config, fingerprints, unread, problem = kept.laid_over(at_start)
    launch = replace(launch, config=config)
    launch.threshold.level = config.log.level
    if changed := [change for _, change in differences(at_start, config)]:
        log.info("reload kept", changed=changed)
    if unread:
        log.error("not reloaded", reason=unread)
    have = {each.model.name: each.model.fingerprint for each in launch.prepared}
    if config.model.folder != at_start.model.folder or (fingerprints or have) != have:
        try:
            newest = replace(launch, prepared=prepare(config, log, restart=True))
            return asyncio.run(_serve(newest, kept, on_ready, unread, problem))
        except CannotServe as error:
            problem = f"models are as at the start: {error}"
            launch = replace(launch, config=at_start.with_values(_changeable(config)))
    return asyncio.run(_serve(launch, kept, on_ready, unread, problem))


async def _serve(launch: Launch, kept: Kept, on_ready: Callable[[str], None], unread: str, problem: str) -> int:
    config, prepared, log = launch.config, launch.prepared, launch.log
    allow_open_files(config.limits.max_connections + files_kept_back(config))
    server = make_server(config, prepared, log, shard=launch.shard)
    server.unread, server.loader.problem = unread, problem
    if problem:
        log.error("models not reloaded", reason=problem)
    log.debug("configuration", **config.model_dump(mode="json"))
    stops, had_terminal = 0, has_terminal()
    reloads, turn = Tasks(lambda error: log.error("bug in a reload", exc_info=error)), asyncio.Lock()

    async def reload_in_turn() -> None:
        async with turn:
            await reload(server, launch.reread, launch.threshold, log, kept)

    def stop() -> None:
        nonlocal stops
        stops += 1
        if stops == 1:
            log.info("stopping", hint="finishing what was admitted; interrupt again to force")
            if launch.shard.count == 1:  # one of several may end alone
                launch.service_manager.stopping()
        server.stop(drain=stops == 1)

    def hung_up() -> None:
        if stops:
            return  # it ends already, and this is no reason to force it
        if had_terminal and not has_terminal():
            stop()
        else:
            reloads.start(reload_in_turn())

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    for number, call in ((signal.SIGTERM, stop), (signal.SIGHUP, hung_up)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            loop.add_signal_handler(number, call)
    _say_what_is_served(server, prepared, log)
    names = ", ".join(each.model.name for each in prepared)
    where = server.endpoint if launch.shard.count == 1 else f"{launch.shard.count} endpoints"
    launch.service_manager.serving(f"serving {names} at {where}", launch.shard.number)
    on_ready(server.endpoint)
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
    if server.shutdown.was_crash and launch.is_supervised and not stops:
        os.kill(os.getpid(), signal.SIGKILL)  # the supervisor starts the next server only after a death by a signal
    if server.shutdown.failure is not None:
        return 1
    return 130 if stops > 1 else 0


def has_terminal() -> bool:
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
    admin = {"http": server.admin.url} if server.admin is not None and server.admin.url else {}
    endpoint = re.sub(r"//(0\.0\.0\.0|\*|\[::\]):", "//127.0.0.1:", server.endpoint)
    asks, keys = f"ping -e {shlex.quote(endpoint)}", {}
    if (key_file := server.config.transport.key_file) is not None:
        keys = {"keys": "on", "peers": len(server.used())}
        asks = f"--key-file NAME.key_secret --server-key {shlex.quote(str(key_file.with_suffix('.key')))} {asks}"
    log.info("serving", endpoint=server.endpoint, **admin, **keys, next=f"instep {asks}")
