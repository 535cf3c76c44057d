"""Builds the service of a prepared model: memory and executor first, then everything that uses them."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from instep.config import Config
from instep.core.streams import StreamTable
from instep.core.tables import Tables, make_tables
from instep.core.typing import I64, U32, float32_zeros
from instep.frontends.models import Served
from instep.frontends.shards import Shard
from instep.recording.reader import load_open_streams
from instep.recording.records import OpenStream
from instep.runtime.executor import Step, StepExecutor, ThreadExecutor, usable_cores
from instep.runtime.process_executor import ProcessExecutor, shared_zeros
from instep.runtime.stepper import Stepper
from instep.server.preparation import CannotServe, Prepared
from instep.server.versions import Planned
from instep.streaming.engine import Engine, EngineLimits
from instep.streaming.hibernation import Hibernation, IdleLimits, Tombstones
from instep.streaming.journal import Journal
from instep.streaming.listing import Listing
from instep.streaming.operations import Reaper, StreamOperations
from instep.streaming.origins import Origins
from instep.streaming.service import About, ModelService
from instep.streaming.states import Checkpoints, StreamStates
from instep.streaming.stats import EngineStats, EventKind, EventLog
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep.streaming.verification import Verification
from instep_client.protocol.wire import PROTOCOL_VERSION, ServerInfo

_FLOAT32_BYTES = 4
_ENVELOPE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """The configured limits, lowered to fit a model."""

    max_block_frames: int
    credit_frames: int


def effective_limits(config: Config, features: int, outputs: int) -> EffectiveLimits:
    """Fit the limits of the configuration to a model.

    A block's frames and its answer must each fit into one message of `transport.max_message_bytes`; a connection's
    credit is bounded by the bytes of its unread answers.

    Raises:
        CannotServe: when not even one frame fits.
    """
    width_bytes = max(features, outputs) * _FLOAT32_BYTES
    fitting = (config.transport.max_message_bytes - _ENVELOPE_BYTES) // (width_bytes + 24)
    if fitting < 1:
        raise CannotServe(
            f"transport.max_message_bytes is {config.transport.max_message_bytes}, but one frame of this model takes "
            f"{width_bytes + 24} bytes and {_ENVELOPE_BYTES} more; raise it"
        )
    return EffectiveLimits(
        max_block_frames=min(config.limits.max_block_frames, fitting),
        credit_frames=min(config.limits.credit_frames, 2 * fitting),
    )


def idle_limits(config: Config) -> IdleLimits:
    """The times after which idle streams leave memory and are closed."""
    limits = config.limits
    return IdleLimits(
        round(limits.max_idle_s * 1e9),
        round(limits.park_s * 1e9),
        limits.max_parked_streams,
        round(limits.hibernate_after_s * 1e9),
    )


_FEW_CORES: Final = 2
"""With this many cores or fewer, the loop and a stepping process leave none for clients and the recorder."""
_BUSY_POLL_NS: Final = 300_000
"""The time for which the loop polls after an event, because being woken costs more than a small step."""
_LIGHT_BATCH: Final = 128
"""The most single frames in a batch that the loop steps. (AMD EPYC with 2 cores, GRU 40→128, 256 streams in closed
loop: 86,000 messages/s with 96, 95,000 with 128, 90,000 with 192, 72,000 with all of them stepped in a process.)"""


def steps_in_process(device: torch.device) -> bool:
    """Whether steps on this device run in another process."""
    return device.type == "cpu" and hasattr(os, "fork") and usable_cores() > 1


def max_light_batch(config: Config, forks: bool) -> int:
    """The most single frames in a batch that the loop itself steps; 0 if the loop does not step.

    It does so if a stepping process would share its cores.
    """
    steps_inline = forks and config.recording.path is None and usable_cores() <= _FEW_CORES
    return min(_LIGHT_BATCH, config.engine.max_batch_size) if steps_inline else 0


def busy_poll_ns(config: Config) -> int:
    """The polling time of the loop; 0 if polling would keep the recorder from a core.

    (Intel Xeon with 2 cores, GRU 40→128, 64 streams at 50 Hz, recorded: p99 8.7 ms with polling, 7.1 ms without; the
    median of a single stream in closed loop is the same.)
    """
    has_no_core = config.recording.path is not None and usable_cores() <= _FEW_CORES
    return 0 if has_no_core else _BUSY_POLL_NS


def make_executor(config: Config, step: Step, forks: bool) -> StepExecutor:
    """Make an executor that is a process if `forks`, otherwise a thread.

    Raises:
        CannotServe: when the process cannot be started.
    """
    if not forks:
        return ThreadExecutor(step)
    try:
        # Twice as long as the loop: it waits for the loop.
        return ProcessExecutor(step, config.engine.max_batch_size, 2 * busy_poll_ns(config))
    except OSError as error:
        raise CannotServe(f"no process for the steps can be started: {error}") from None


_MOST_NAMES: Final = 100
"""The most streams named in one line of the log."""
_MOST_READERS: Final = 4
"""The most threads that read hibernating streams from one recording at the same time."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The memory of a model's streams, and the executor that steps them."""

    planned: Planned
    limits: EffectiveLimits
    tables: Tables
    stepper: Stepper
    executor: StepExecutor
    forks: bool
    """Whether the executor is a process."""

    @property
    def prepared(self) -> Prepared:
        """The model."""
        return self.planned.prepared


def allocate(
    config: Config, planned: Planned, *, forks: bool, stepper: Stepper | None = None, tables: Tables | None = None
) -> Allocation:
    """Allocate memory and start the executor.

    If the executor `forks`, its process must start before ZeroMQ has threads. `stepper` replaces the usual one in
    tests; `tables` come from another version of the model with the same sizes.

    Raises:
        CannotServe: when the limits cannot serve this model, or the process cannot be started.
        MemoryError, RuntimeError: when memory does not suffice; torch raises the latter.
    """
    prepared, network = planned.prepared, planned.prepared.network
    limits = effective_limits(config, network.description.features, network.description.outputs)
    max_streams, zeros = config.engine.max_streams, shared_zeros if forks else float32_zeros
    if tables is None:
        tables = make_tables(
            max_streams,
            config.limits.max_connections,
            config.limits.window_frames,
            network.description.features,
            network.description.outputs,
            config.limits.max_pending_frames,
            limits.max_block_frames,
            limits.credit_frames,
            zeros,
        )
    if stepper is None:
        stepper = Stepper(network, config.engine.max_batch_size, max_streams, prepared.device, zeros)

    def step(slots: I64, rows: I64) -> None:
        stepper.step(slots, rows, tables.x, tables.y)

    return Allocation(planned, limits, tables, stepper, make_executor(config, step, forks), forks)


def make_service(
    config: Config,
    allocation: Allocation,
    wake: Callable[[], None],
    on_bug: Callable[[BaseException], None],
    former: ModelService | None = None,
) -> ModelService:
    """Make a service without connections and without a recorder; call it inside the event loop.

    `wake` lets the loop take a turn, and `on_bug` gets unexpected exceptions. `former`
    serves another version of the model. The new service takes over its tables, streams and connections, so only one of
    the two may run.
    """
    tables, stepper, limits = allocation.tables, allocation.stepper, allocation.limits
    file, log = allocation.planned.file, allocation.planned.log

    def log_failure(error: Exception, streams: int) -> None:
        log.error("step failed", error=repr(error), streams=streams)

    def log_event(kind: EventKind, streams: Sequence[str], detail: str) -> None:
        names = [name for name in streams[:_MOST_NAMES] if name]
        log.debug("stream event", kind=kind, detail=detail, streams=len(streams) if names else 0, names=names)

    if former is None:
        table = StreamTable(tables, _random_generations(config.engine.max_streams), time.time_ns())
        origins, tombstones, events = Origins(tables), Tombstones(), EventLog(on_event=log_event)
    else:
        table, origins, events = former.engine.table, former.engine.origins, former.events
        tombstones = former.operations.hibernation.tombstones
    tasks = Tasks(on_bug)
    engine = Engine(
        tables,
        table,
        origins,
        allocation.executor,
        Journal(tables, table, wake),
        EngineLimits(
            config.engine.max_batch_size,
            config.engine.max_queue_delay_us * 1000,
            limits.max_block_frames,
            max_light_batch(config, allocation.forks),
        ),
        EngineStats(),
        events,
        log_failure,
        asyncio.get_running_loop().call_later,
        wake,
    )
    states = StreamStates(engine, stepper)
    hibernation = Hibernation(engine, states, tombstones, _loader(file), idle_limits(config), tasks)
    operations = StreamOperations(engine, states, hibernation, tasks)
    return ModelService(
        name=allocation.prepared.model.name,
        engine=engine,
        operations=operations,
        reaper=Reaper(engine, operations),
        states=states,
        checkpoints=Checkpoints(engine, states, tasks, round(config.recording.recovery_target_s * 1e9)),
        listing=Listing(table, hibernation),
        tasks=tasks,
        log=log,
        about=_about(config, allocation),
        steps_apart=allocation.forks,
        file=file,
        folder=allocation.prepared.model_path,
        verification=Verification() if config.verify.live else None,
    )


def _about(config: Config, allocation: Allocation) -> About:
    prepared = allocation.prepared
    return About(
        fingerprint=prepared.model.fingerprint,
        kind=prepared.network.description.kind,
        device=str(prepared.device),
        exactness=prepared.exactness,
        arithmetic=prepared.arithmetic,
        features=prepared.network.description.features,
        outputs=prepared.network.description.outputs,
        max_streams=config.engine.max_streams,
        durability="memory" if config.recording.path is None else config.recording.durability,
    )


def make_served(config: Config, allocation: Allocation, service: ModelService, shard: Shard) -> Served:
    """The view of a service for its connections."""
    prepared, about = allocation.prepared, asdict(service.about)
    del about["kind"]
    info = ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=secrets.token_hex(8),
        model=prepared.model.name,
        state=prepared.network.state,
        max_message_bytes=config.transport.max_message_bytes,
        max_idle_s=config.limits.max_idle_s,
        window_frames=config.limits.window_frames,
        park_s=config.limits.park_s,
        shard=shard.number,
        shards=shard.count,
        term=shard.term,
        output_names=prepared.model.output_names,
        **about,
        **asdict(allocation.limits),
    )
    return Served(service, info)


def _random_generations(max_streams: int) -> U32:
    """The first generation of each slot: never 0, and random so that handles cannot be guessed."""
    numbers = np.frombuffer(secrets.token_bytes(4 * (max_streams + 1)), np.uint32)
    return (numbers | np.uint32(1)).astype(np.uint32)


def _loader(path: Path | None) -> Callable[[Sequence[int]], Awaitable[list[OpenStream]]]:
    """A function that reads open streams from the recording, in a few threads."""
    room = asyncio.Semaphore(_MOST_READERS)

    async def load(streams: Sequence[int]) -> list[OpenStream]:
        assert path is not None, "without a recording nothing hibernates"
        async with room:
            return await in_daemon_thread(partial(load_open_streams, path, streams), "instep-reader")

    return load
