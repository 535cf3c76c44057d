"""From what was prepared to a server: sizes, states, socket and recording, in an order that can be undone."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version

import structlog
import torch
import zmq

from instep.config import Config, EngineConfig
from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, float32_zeros
from instep.models.gru.network import GruNetwork
from instep.models.numerics import numerics
from instep.recording.database import check_place, holds_recording
from instep.recording.errors import RecordingError, with_advice
from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from instep.runtime.cores import usable_cores
from instep.runtime.shared_memory import shared_zeros
from instep.runtime.step_process import StepProcess
from instep.runtime.stepper import Stepper
from instep.server.limits import EffectiveLimits, LimitsError, effective_limits
from instep.server.preparation import CannotServe, Prepared
from instep.server.recovery import Recovery, go_on
from instep.server.server import Server
from instep.server.streams import Streams
from instep.server.transport import Router
from instep_client.protocol.wire import PROTOCOL_VERSION, ServerInfo


def recording_header(prepared: Prepared, config: Config) -> RecordingHeader:
    """What a recording of this server says of it."""
    certification = prepared.certification
    return RecordingHeader(
        instep_version=version("instep"),
        created_ns=time.time_ns(),
        model_name=prepared.model.name,
        model_folder=str(prepared.model_path),
        description=prepared.model.description.as_json(),
        model_fingerprint=prepared.model.fingerprint,
        numerics=numerics(prepared.device),
        exactness=certification.exactness,
        buckets=certification.buckets,
        max_ulp=certification.max_ulp,
        durability=config.recording.durability,
    )


def server_info(config: Config, prepared: Prepared, limits: EffectiveLimits) -> ServerInfo:
    """What WELCOME says."""
    network, certification = prepared.network, prepared.certification
    return ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=secrets.token_hex(8),
        model=prepared.model.name,
        fingerprint=prepared.model.fingerprint,
        features=network.features,
        outputs=network.outputs,
        state_layers=network.state_layers,
        state_size=network.state_size,
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
    )


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
        accept_numerics_change: whether to go on with a recording although floats may come out with other bits now.

    Raises:
        CannotServe: when the endpoint, the recording, the limits or the memory do not allow it.
    """
    network, certification = prepared.network, prepared.certification
    writer, recovery = None, None
    with ExitStack() as undo:
        try:
            limits = effective_limits(config, certification.buckets[-1], network.features, network.outputs)
            info = server_info(config, prepared, limits)
            apart = stepper is None and steps_apart(config.engine, prepared.device)
            zeros = shared_zeros if apart else float32_zeros
            streams = _streams(limits, network, zeros)
            process = None
            if stepper is None:
                buckets = certification.buckets
                stepper = Stepper(network, buckets, config.engine.max_streams, prepared.device, zeros)
            if apart:
                # Before the socket: ZeroMQ's threads are not forked.
                process = _step_process(stepper, streams.rings, config.engine.spin_us)
                undo.callback(process.stop, 0.0)  # it has nothing to finish
            router = Router(config.transport)
            undo.callback(router.close)
            if config.recording.file is not None:
                writer, recovery = _recording(config, prepared, streams, stepper, accept_numerics_change)
                undo.callback(writer.discard if recovery is None else writer.abandon)
            server = Server(config, router, stepper, info, streams, writer, process, log)
        except (LimitsError, RecordingError) as error:
            raise CannotServe(with_advice(error)) from None
        except (MemoryError, RuntimeError) as error:  # torch's own kind is the latter
            raise _no_memory(config, error) from None
        except zmq.ZMQError as error:
            raise CannotServe(
                f"cannot bind {config.transport.endpoint}: {error}; is another server using it?"
            ) from None
        undo.pop_all()
    server.recovery = recovery
    return server


def steps_apart(engine: EngineConfig, device: torch.device) -> bool:
    """Whether steps get a process of their own.

    Raises:
        CannotServe: when they were to, and cannot.
    """
    obstacles = {
        f"the device is {device}": device.type != "cpu",
        "this system has no fork": not hasattr(os, "fork"),
        "engine.threads is above 1, and threads are lost in a fork": engine.threads > 1,
    }
    if engine.steps_in == "process":
        for obstacle, is_there in obstacles.items():
            if is_there:
                raise CannotServe(f"engine.steps_in is process, but {obstacle}; use auto or thread")
        return True
    return engine.steps_in == "auto" and not any(obstacles.values()) and usable_cores() > 1


def _step_process(stepper: Stepper, rings: Rings, spin_us: int) -> StepProcess:
    def step(slots: I64, rows: I64) -> None:
        stepper.step(slots, rows, rings.x, rings.y)

    try:
        # It waits for the loop, so it stays awake for longer.
        return StepProcess(step, stepper.buckets[-1], 2 * spin_us * 1000)
    except OSError as error:
        raise CannotServe(f"no process for the steps can be started ({error}); set engine.steps_in to thread") from None


def _streams(limits: EffectiveLimits, network: GruNetwork, zeros: Callable[[tuple[int, ...]], F32]) -> Streams:
    table = StreamTable(limits.max_streams, limits.max_connections, limits.first_generation, time.time_ns())
    rings = Rings(
        table,
        limits.window_frames,
        limits.max_streams,
        network.features,
        network.outputs,
        limits.max_pending_frames,
        zeros,
    )
    return Streams(limits, table, rings)


def _recording(
    config: Config,
    prepared: Prepared,
    streams: Streams,
    stepper: Stepper,
    accept_numerics_change: bool,
) -> tuple[RecordingWriter, Recovery | None]:
    """A new recording, or the one that is there, with its streams put back."""
    path = config.recording.file
    assert path is not None
    header = recording_header(prepared, config)
    check_place(path)
    if not holds_recording(path):
        return RecordingWriter.create(path, header), None
    writer, recovery = go_on(
        path, header, streams.table, streams.rings, stepper, accept_numerics_change=accept_numerics_change
    )
    streams.last_stream = recovery.last_stream
    return writer, recovery


def _no_memory(config: Config, error: Exception) -> CannotServe:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return CannotServe(
        f"no memory for engine.max_streams = {config.engine.max_streams}, limits.window_frames = "
        f"{config.limits.window_frames} and limits.max_pending_frames = {config.limits.max_pending_frames}; "
        f"lower one of them ({why})"
    )
