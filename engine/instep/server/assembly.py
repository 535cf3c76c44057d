"""From what was prepared to a server: every part is made here, in an order that can be undone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import shlex
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from instep.config import Config
from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import Tables, make_tables
from instep.core.typing import U32, float32_zeros
from instep.frontends.zmq.decode import Decoder
from instep.frontends.zmq.frontend import ZmqFrontend
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import CannotBind, Router
from instep.models.numerics import numerics
from instep.recording.database import check_place, holds_recording, lost_tail
from instep.recording.errors import DamagedRecording, RecordingError, with_advice
from instep.recording.open_streams import OpenStream, load_open_streams
from instep.recording.recorder import Recorder
from instep.recording.schema import RecordingHeader
from instep.recording.scrub import Scrub
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.runtime.process_executor import shared_zeros
from instep.runtime.stepper import Stepper
from instep.server.execution import make_executor, max_light_batch, steps_in_process
from instep.server.limits import EffectiveLimits, LimitsError, effective_limits, idle_limits
from instep.server.loop import Loop
from instep.server.preparation import CannotServe, Prepared
from instep.server.server import Server
from instep.server.shutdown import Shutdown
from instep.streaming.checkpoints import Checkpoints
from instep.streaming.engine import Engine, EngineLimits
from instep.streaming.hibernation import Hibernation, Tombstones
from instep.streaming.journal import Journal
from instep.streaming.listing import Listing
from instep.streaming.operations import StreamOperations
from instep.streaming.origins import Origins
from instep.streaming.reaper import Reaper
from instep.streaming.recovery import Recovery, resume_recording
from instep.streaming.states import StreamStates
from instep.streaming.stats import EngineStats
from instep.streaming.tasks import Tasks
from instep_client.protocol.wire import PROTOCOL_VERSION, ServerInfo

_MOST_READERS: Final = 4
"""Threads that read hibernated streams from the recording at the same time."""


def make_server(
    config: Config,
    prepared: Prepared,
    log: structlog.stdlib.BoundLogger,
    stepper: Stepper | None = None,
    *,
    accept_numerics_change: bool = False,
) -> Server:
    """A server that is bound and not yet serving; called inside the event loop.

    Args:
        config: the configuration.
        prepared: what `prepare` made of it.
        log: where the server says what it does.
        stepper: another one than usual, for tests.
        accept_numerics_change: whether to continue a recording although floats may come out with other bits now.

    Raises:
        CannotServe: when the endpoint, the recording, the limits or the memory do not allow it.
    """
    with ExitStack() as undo:
        try:
            server = _make_server(config, prepared, log, stepper, undo, accept_numerics_change)
        except (LimitsError, RecordingError) as error:
            raise CannotServe(with_advice(error)) from None
        except CannotBind as error:
            raise CannotServe(str(error)) from None
        except (MemoryError, RuntimeError) as error:  # torch's own kind is the latter
            raise _no_memory(config, error) from None
        undo.pop_all()
    return server


def _make_server(
    config: Config,
    prepared: Prepared,
    log: structlog.stdlib.BoundLogger,
    stepper: Stepper | None,
    undo: ExitStack,
    accept_numerics_change: bool,
) -> Server:
    network, buckets = prepared.network, prepared.certification.buckets
    limits = effective_limits(config, buckets[-1], network.description.features, network.description.outputs)
    info = server_info(config, prepared, limits)
    forks = stepper is None and steps_in_process(config.engine, prepared.device)

    # Memory, and the process that shares it: before the socket, whose threads must not be forked.
    zeros = shared_zeros if forks else float32_zeros
    tables = make_tables(
        limits.max_streams,
        limits.max_connections,
        limits.window_frames,
        network.description.features,
        network.description.outputs,
        limits.max_pending_frames,
        limits.max_block_frames,
        limits.credit_frames,
        zeros,
    )
    table = StreamTable(tables, _random_generations(limits.max_streams), time.time_ns())
    if stepper is None:
        stepper = Stepper(network, buckets, limits.max_streams, prepared.device, zeros)
    executor = make_executor(config, stepper, tables, forks)
    undo.callback(executor.stop, 0.0)
    router = Router(config.transport)
    undo.callback(router.close)

    # The loop, and everything it moves.
    shutdown = Shutdown(log)
    busy_poll_ns = (
        config.engine.busy_poll_us * 1000 if forks else 0
    )  # a thread that steps would lack the interpreter's lock
    loop = Loop(busy_poll_ns, shutdown.bug)
    journal = Journal(tables, table, loop.wake)
    stats, origins, tasks = EngineStats(), Origins(tables), Tasks(shutdown.bug)

    def log_failure(error: Exception, streams: int) -> None:
        log.error("step failed", error=repr(error), streams=streams)

    engine_limits = EngineLimits(
        limits.max_batch_size,
        limits.max_queue_delay_ns,
        limits.max_block_frames,
        max_light_batch(config, limits.max_batch_size, forks),
    )
    call_later = asyncio.get_running_loop().call_later
    engine = Engine(
        tables,
        table,
        origins,
        stepper.buckets,
        executor,
        journal,
        engine_limits,
        stats,
        log_failure,
        call_later,
        loop.wake,
    )
    tombstones = Tombstones()
    idle, states = idle_limits(config), StreamStates(engine, stepper, loop.wake, log_failure)
    hibernation = Hibernation(engine, states, tombstones, _loader(config.recording.file), idle, tasks)
    operations = StreamOperations(engine, states, hibernation, tombstones, tasks)
    operations.parked_make_room = config.limits.parked_make_room
    reaper = Reaper(engine, operations, hibernation, idle)
    checkpoints = Checkpoints(engine, states, tasks, round(config.recording.recovery_target_s * 1e9))

    # The front end.

    def detach(peer: Peer) -> None:
        log.debug("disconnected", connection=peer.number, streams=int(table.owned[peer.number]))
        reaper.detach(peer)

    outbound = Outbound(
        router,
        tables,
        limits.max_unread_bytes,
        limits.max_outbox_bytes,
        config.limits.max_buffered_bytes,
        round(config.limits.unreachable_after_s * 1e9),
        time.monotonic_ns,
        detach,
    )
    decoder = Decoder(network.description.features, network.state, limits.max_block_frames, limits.max_message_bytes)
    probe_after_ns = round(config.transport.heartbeat_s * 1e9)
    listing = Listing(table, hibernation, idle)
    frontend = ZmqFrontend(
        router, engine, operations, reaper, tasks, outbound, decoder, info, probe_after_ns, loop.wake, listing, log
    )
    loop.engine, loop.operations, loop.tasks, loop.frontends = engine, operations, tasks, [frontend]

    # The recording, last: nothing that can fail comes after it.
    recorder, recovery = None, None
    if config.recording.file is not None:
        writer, recovery = _recording(
            config, prepared, tables, table, journal.dirty, stepper, log, accept_numerics_change
        )
        undo.callback(writer.discard if recovery is None else writer.abandon)
        log.info("recording", file=str(writer.path), durability=info.durability)
        recorder = _recorder(config, writer, journal, loop, shutdown, log)
        last_stream = 0 if recovery is None else recovery.last_stream
        hibernation.restarted({} if recovery is None else recovery.hibernated)
        replayed_ns = round(recovery.seconds * 1e9) if recovery is not None and recovery.frames else 0
        waits = info.durability != "memory"
        journal.record(recorder, last_stream, writer.position, waits=waits, replayed_ns=replayed_ns)
    scrub = None
    if recovery is not None and recovery.checkpoint_position:
        scrub = _scrub(writer.path, recovery.checkpoint_position, log)
    return Server(
        config,
        info,
        shutdown,
        loop,
        engine,
        operations,
        reaper,
        checkpoints,
        tasks,
        frontend,
        recorder,
        recovery,
        scrub,
        log,
    )


def server_info(config: Config, prepared: Prepared, limits: EffectiveLimits) -> ServerInfo:
    """The server's description of itself for WELCOME."""
    network, certification = prepared.network, prepared.certification
    return ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=secrets.token_hex(8),
        model=prepared.model.name,
        fingerprint=prepared.model.fingerprint,
        features=network.description.features,
        outputs=network.description.outputs,
        state=network.state,
        device=str(prepared.device),
        exactness=certification.exactness,
        buckets=certification.buckets,
        max_streams=limits.max_streams,
        max_message_bytes=limits.max_message_bytes,
        max_block_frames=limits.max_block_frames,
        credit_frames=limits.credit_frames,
        max_idle_s=config.limits.max_idle_s,
        window_frames=limits.window_frames,
        durability="memory" if config.recording.file is None else config.recording.durability,
        park_s=config.limits.park_s,
        output_names=prepared.model.output_names,
    )


def recording_header(prepared: Prepared, config: Config) -> RecordingHeader:
    """The header of a recording of this server."""
    certification = prepared.certification
    return RecordingHeader(
        instep_version=version("instep"),
        created_ns=time.time_ns(),
        model_name=prepared.model.name,
        model_folder=str(prepared.model_path),
        description=prepared.model.description.as_json(),
        features=prepared.model.description.features,
        outputs=prepared.model.description.outputs,
        state=prepared.model.description.state.encode(),
        model_fingerprint=prepared.model.fingerprint,
        numerics=numerics(prepared.device, prepared.network.kernel),
        exactness=certification.exactness,
        buckets=certification.buckets,
        max_ulp=certification.max_ulp,
        durability=config.recording.durability,
        output_names=prepared.model.output_names,
    )


def _random_generations(max_streams: int) -> U32:
    """Where the generations of slots begin: unpredictable, so that handles are, and never 0."""
    numbers = np.frombuffer(secrets.token_bytes(4 * (max_streams + 1)), np.uint32)
    return (numbers | np.uint32(1)).astype(np.uint32)


def _loader(path: Path | None) -> Callable[[Sequence[int]], Awaitable[list[OpenStream]]]:
    """Reads open streams from the recording, in a few threads at once."""
    room = asyncio.Semaphore(_MOST_READERS)

    async def load(streams: Sequence[int]) -> list[OpenStream]:
        assert path is not None, "without a recording nothing hibernates"
        loaded: concurrent.futures.Future[list[OpenStream]] = concurrent.futures.Future()
        loaded.set_running_or_notify_cancel()  # nobody can cancel it any more: the thread sets a result

        def read() -> None:
            try:
                loaded.set_result(load_open_streams(path, streams))
            except BaseException as error:
                loaded.set_exception(error)

        async with room:
            # A forced end waits for the threads of `asyncio.to_thread`, however long the disk takes; not for these.
            threading.Thread(target=read, name="instep-reader", daemon=True).start()
            return await asyncio.wrap_future(loaded)

    return load


def _recording(
    config: Config,
    prepared: Prepared,
    tables: Tables,
    table: StreamTable,
    dirty: DirtyTracker,
    stepper: Stepper,
    log: structlog.stdlib.BoundLogger,
    accept_numerics_change: bool,
) -> tuple[RecordingWriter, Recovery | None]:
    """A new recording, or the one that is there, with its streams put back."""
    path = config.recording.file
    assert path is not None
    header = recording_header(prepared, config)
    retention = Retention(config.recording.keep_bytes, round(config.recording.keep_s * 1e9))
    check_place(path)
    if not holds_recording(path):
        return RecordingWriter.create(path, header, retention), None
    if tail := lost_tail(path):
        log.warning("recording lost its end", file=str(path), reason=tail)
    log.info("recovering", recording=str(path))
    writer, recovery = resume_recording(
        path,
        header,
        tables,
        table,
        dirty,
        stepper,
        accept_numerics_change=accept_numerics_change,
        retention=retention,
    )
    seconds = round(recovery.seconds, 4)
    log.info("recovered", streams=recovery.streams, frames_replayed=recovery.frames, seconds=seconds)
    return writer, recovery


def _scrub(path: Path, through: int, log: structlog.stdlib.BoundLogger) -> Scrub:
    def damaged(error: DamagedRecording) -> None:
        reason = f"{error}; open streams do not need it, but it cannot be verified any more"
        log.error("recording damaged", reason=reason, next=f"instep recordings repair {shlex.quote(str(path))}")

    return Scrub(path, through, damaged)


def _recorder(
    config: Config,
    writer: RecordingWriter,
    journal: Journal,
    loop: Loop,
    shutdown: Shutdown,
    log: structlog.stdlib.BoundLogger,
) -> Recorder:
    running = asyncio.get_running_loop()

    def on_loop(call: Callable[..., None], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was forced to end
            running.call_soon_threadsafe(call, *values)

    def failed(error: Exception) -> None:
        on_loop(shutdown.fail, f"the recording {config.recording.file} failed: {error}")

    return Recorder(
        writer,
        config.recording.queue_batches,
        on_room=lambda: on_loop(loop.wake),
        on_failure=failed,
        on_durable=lambda lsn: on_loop(journal.advance, lsn),
        on_trimmed=lambda position: log.info("recording trimmed", position=position),
    )


def _no_memory(config: Config, error: Exception) -> CannotServe:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return CannotServe(
        f"no memory for engine.max_streams = {config.engine.max_streams}, limits.window_frames = "
        f"{config.limits.window_frames} and limits.max_pending_frames = {config.limits.max_pending_frames}; "
        f"lower one of them ({why})"
    )
