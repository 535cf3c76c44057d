"""Makes a server from prepared models; every part is made here, in an order that can be undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import structlog

from instep.config import Config
from instep.frontends import CannotListen
from instep.frontends.http.admin import AdminServer, bind
from instep.frontends.http.security import read_tokens
from instep.frontends.models import Models
from instep.frontends.shards import Shard
from instep.frontends.zmq.frontend import ZmqFrontend
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import Router
from instep.frontends.zmq.table import PeerTable
from instep.recording.errors import RecordingError, with_advice
from instep.runtime.stepper import Stepper
from instep.security.keys import ServerKeys
from instep.server import checks
from instep.server.live_verification import Supervision
from instep.server.loop import Loop, Shutdown
from instep.server.preparation import CannotServe, Prepared, log_of
from instep.server.recordings import NextModel
from instep.server.server import Server
from instep.server.services import Allocation, allocate, busy_poll_ns, make_service, steps_in_process
from instep.server.versions import Planned, plan
from instep_client.protocol.errors import InvalidInput

UNREACHABLE_AFTER_S: Final = 30.0
"""The time after which a connection that does not read its outbox is given up."""

MakeStepper = Callable[[Prepared, Config], Stepper]


def make_server(
    config: Config,
    prepared: Sequence[Prepared],
    log: structlog.stdlib.BoundLogger,
    make_stepper: MakeStepper | None = None,
    *,
    forks: bool | None = None,
    supervision: Supervision | None = None,
    shard: Shard | None = None,
) -> Server:
    """Make a server that is bound and not yet serving; call it inside the event loop.

    `shard` is its place in a cluster; None for a server on its own.

    Tests give `make_stepper` to replace the steppers, `forks` to choose whether steps get a process of their own, and
    `supervision` to run the process that checks in another way.

    Raises:
        CannotServe: when the endpoint, the recording, the limits or the memory do not allow it.
    """
    try:
        with ExitStack() as undo:
            is_only, models = len(prepared) == 1, Models(shard)
            planned: list[Planned] = []
            for one in prepared:
                planned += plan(config, one, log_of(one.model.name, log, is_only=is_only))
            planned.sort(key=lambda each: bool(each.kept_as))

            # Memory, and the processes that share it: before the socket, whose threads must not be forked.
            allocations: list[Allocation] = []
            for each in planned:
                apart = make_stepper is None and (steps_in_process(each.prepared.device) if forks is None else forks)
                stepper = make_stepper(each.prepared, config) if make_stepper is not None else None
                allocations.append(allocation := allocate(config, each, forks=apart, stepper=stepper))
                undo.callback(allocation.executor.stop, 0.0)
            keys = ServerKeys.read(config.transport)
            router = Router(config.transport, keys)
            undo.callback(router.close)
            tokens = read_tokens(config.http)
            listener = bind(config.http, log, path=models.shard.admin)
            if listener is not None:
                undo.callback(listener.close)

            # The loop, the front end and the services, which do not know each other yet.
            shutdown = Shutdown(log)
            loop = Loop(busy_poll_ns(config), shutdown.bug)
            frontend = _frontend(config, models, router, loop, log)
            loop.frontends = [frontend]
            new = [NextModel(each, make_service(config, each, loop.wake, shutdown.bug)) for each in allocations]

            # The recordings, last: nothing that can fail comes after them.
            for model in new:
                model.open_recording(config, undo)
            server = Server(config, shutdown, loop, models, log, supervision or Supervision())
            for model in new:
                model.record(config, loop, shutdown, models.shard)
                server.add(model.served(config, models.shard))
            if listener is not None:
                server.admin = AdminServer(listener, tokens, server, log)
            undo.pop_all()
            return server
    except (CannotListen, InvalidInput, RecordingError) as error:
        raise CannotServe(with_advice(error)) from None
    except (MemoryError, RuntimeError) as error:  # torch's own kind is the latter
        raise _no_memory(config, error) from None


def _frontend(
    config: Config, models: Models, router: Router, loop: Loop, log: structlog.stdlib.BoundLogger
) -> ZmqFrontend:
    def detach(peer: Peer) -> None:
        service = peer.served.service
        about = {"connection": peer.number, "principal": peer.principal.name, "reason": peer.reason or None}
        log.debug("disconnected", **about, streams=int(service.engine.table.owned[peer.number]))
        service.reaper.detach(peer)
        if router.authenticator is not None:
            router.authenticator.dismiss(peer.connection)

    outbound = Outbound(
        router,
        PeerTable(checks.max_connections(config)),
        2 * config.transport.max_message_bytes,
        4 * config.transport.max_message_bytes,
        checks.MAX_BUFFERED_BYTES,
        round(UNREACHABLE_AFTER_S * 1e9),
        time.monotonic_ns,
        detach,
    )
    probe_after_ns = round(config.transport.heartbeat_s * 1e9)
    return ZmqFrontend(models, router, outbound, probe_after_ns, loop.wake, log)


def _no_memory(config: Config, error: Exception) -> CannotServe:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return CannotServe(
        f"no memory for engine.max_streams = {config.engine.max_streams}, limits.window_frames = "
        f"{config.limits.window_frames} and limits.max_pending_frames = {config.limits.max_pending_frames}; "
        f"lower one of them ({why})"
    )
