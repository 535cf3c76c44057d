"""From a configuration to a running server, and its exit status."""

from __future__ import annotations

import asyncio
import gc
import os
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch

from instep.config import Config, TransportConfig
from instep.core.compiled import are_cached
from instep.models.errors import ModelError
from instep.server.assembly import make_server
from instep.server.checks import (
    FILES_BESIDE_CONNECTIONS,
    allow_open_files,
    before_loading,
    settle,
    with_all_streams,
)
from instep.server.log import Threshold, make_log
from instep.server.preparation import CannotServe, Prepared, prepare, versions
from instep.server.reload import Kept, differences, reload
from instep.server.server import Server
from instep.server.service_manager import ServiceManager
from instep.server.supervisor import supervise
from instep.streaming.warm_up import warm_up


@dataclass(frozen=True, slots=True)
class _Start:
    """How a server is started, besides its configuration."""

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
        reread: reads the configuration again, on SIGHUP; it raises ConfigError. None for the same one always.
        on_ready: called with the endpoint once the server answers.
        restart: whether to serve in a child process that is started again when a signal kills it, or the process in
            which it steps.

    Returns:
        0 after a clean end, 1 after a failure while serving, 130 when a second interrupt forced the end.

    Raises:
        CannotServe: when the server cannot start.
        SystemExit: in the parent of that child, with the child's status.
    """
    threshold = Threshold(config.log.level)
    log = make_log(config.log, threshold)
    settle(before_loading(config, restart=restart), log)
    prepared = prepare(config, log, restart=restart)
    settle(with_all_streams(config, prepared), log)
    if not are_cached("instep.core."):
        log.info("compiling", hint="once on a machine, up to half a minute")
    warm_up()
    gc.freeze()  # what is loaded by now stays: collections need not look at it again
    manager = ServiceManager(os.environ, log)
    start = _Start(reread or (lambda: config), on_ready, Kept(), manager, restart, _has_terminal())
    if restart and supervise(log):
        began, config = config, start.kept.laid_over(config)  # the server that died may have reloaded
        if changed := [change for _, change in differences(began, config)]:
            log.info("reload kept", changed=changed)
        threshold.level = config.log.level
        if _have_changed(prepared, config):
            prepared = prepare(config, log, restart=restart)
    return asyncio.run(_serve(config, prepared, log, threshold, start))


def _have_changed(prepared: Sequence[Prepared], config: Config) -> bool:
    """Whether the configuration names other models, or other versions of them, than those that were loaded."""
    try:
        found = versions(config.model.folders)
    except (ModelError, CannotServe):  # the ones that were loaded can still be served
        return False
    return found != {each.model.name: (each.model_path, each.model.fingerprint) for each in prepared}


async def _serve(
    config: Config, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger, threshold: Threshold, start: _Start
) -> int:
    allow_open_files(config.limits.max_connections + FILES_BESIDE_CONNECTIONS)
    server = make_server(config, prepared, log)
    stops = 0

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
            reload(server, start.reread, threshold, log, start.kept)

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
    """Whether there is a controlling terminal; the system takes it from a process when the terminal closes."""
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
            device=str(each.device),
            exactness=each.exactness,
            max_streams=server.config.engine.max_streams,
        )
    admin = {} if server.admin is None else {"http": server.admin.url}
    log.info("serving", endpoint=server.endpoint, **admin, next=ping_command(server.endpoint, os.environ))


def ping_command(endpoint: str, environ: Mapping[str, str]) -> str:
    """A command that asks this server whether it is ready.

    It names the endpoint unless that is the default one, and these variables of the environment name no other.
    """
    usual = TransportConfig().endpoint
    goes_there = endpoint == usual and (environ.get("INSTEP_ENDPOINT") or usual) == usual
    return f"instep-client ping{'' if goes_there else f' -e {shlex.quote(endpoint)}'}"
