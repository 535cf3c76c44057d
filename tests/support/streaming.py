"""The engine without sockets: real streams, states and network, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from instep.core.admission import SENT_COLUMN
from instep.core.streams import StreamTable
from instep.core.tables import make_tables
from instep.core.typing import F32, I64, U8, U64
from instep.models.model import Model
from instep.recording.reader import load_open_streams
from instep.recording.recorder import Recorder
from instep.recording.records import OpenStream
from instep.recording.schema import Durability
from instep.recording.writer import RecordingWriter, SecondPlace
from instep.replay.recovery import resume_recording
from instep.runtime.executor import RunResult, Step, run_steps
from instep.runtime.stepper import StateAccess, Stepper
from instep.server.loop import Loop
from instep.server.recordings import recording_header
from instep.streaming.api import Frames, Refusal, Reply, StreamEvent
from instep.streaming.engine import Engine, EngineLimits
from instep.streaming.hibernation import Hibernation, IdleLimits, Tombstones
from instep.streaming.journal import Journal
from instep.streaming.listing import Listing
from instep.streaming.operations import Reaper, StreamOperations
from instep.streaming.origins import Origins
from instep.streaming.service import About, ModelService, Recovery
from instep.streaming.states import Checkpoints, StreamStates
from instep.streaming.stats import EngineStats, EventLog
from instep.streaming.tasks import Tasks
from instep_client.protocol.codes import Code
from tests.support.in_process import InProcessFrontend, InProcessOrigin
from tests.support.models import SMALL
from tests.support.running import CPU, config, log_into, prepared


class FaultyStates:
    """States that can neither be read nor written while `is_broken`, or after so many `good_loads`."""

    def __init__(self, stepper: Stepper) -> None:
        self.is_broken = False
        self.good_loads = 10**9
        self._stepper = stepper
        self.state = stepper.state

    def load(self, slots: I64, rows: U8 | None) -> None:
        self._check(self.good_loads <= 0)
        self.good_loads -= 1
        self._stepper.load(slots, rows)

    def read(self, slots: I64) -> U8:
        self._check()
        return self._stepper.read(slots)

    def _check(self, fails: bool = False) -> None:
        if self.is_broken or fails:
            raise RuntimeError("injected")


ABOUT = About("0" * 64, "gru", "cpu", "exact", "portable-1", 1, 1, 1, "memory")
"""Of engines that no process serves."""
PARK_NS = 10**12
"""How long streams of the engines below stay parked."""


class HandExecutor:
    """Steps a run when `finish` is called, or within `begin` if it steps `inline`: a `StepExecutor`.

    Args:
        step: steps a batch.
        inline: whether to step within `begin`.
    """

    signal_fd = None

    def __init__(self, step: Step, inline: bool = False) -> None:
        self.capacity = 1 if inline else 2
        self.begun: deque[tuple[I64, I64]] = deque()
        """Runs that have begun and not ended."""
        self.shapes: list[tuple[int, ...]] = []
        """[steps, streams] of every run so far."""
        self._step = step
        self._inline = inline
        self._results: list[RunResult] = []

    @property
    def has_ended(self) -> bool:
        """See `StepExecutor`."""
        return bool(self._results)

    def begin(self, slots: I64, rows: I64, expected_ns: int, loop_ns: int = 0) -> None:
        """See `StepExecutor`."""
        self.begun.append((slots, rows))
        self.shapes.append(rows.shape)
        if self._inline:
            self.finish()

    def finish(self, *, error: Exception | None = None, after: int = 0, step_ns: int | None = None) -> None:
        """End the oldest run; with an error after that many of its steps."""
        slots, rows = self.begun.popleft()
        result = run_steps(self._step, slots, rows[:after] if error else rows)
        if step_ns is not None:
            result = replace(result, ended_ns=result.began_ns + step_ns * result.steps)
        self._results.append(replace(result, error=result.error or error))

    def ended(self) -> list[RunResult]:
        """See `StepExecutor`."""
        results, self._results = self._results, []
        return results

    def take_signal(self) -> None:
        """There is none."""

    def stop(self, timeout_s: float | None = None) -> None:
        """Nothing runs."""


@dataclass(eq=False)
class Listener:
    """An `Origin` that keeps what it is told."""

    number: int = -1
    arrival: int = 0
    replies: list[Reply] = field(default_factory=list)
    refusals: list[tuple[int, Code]] = field(default_factory=list)
    events: list[StreamEvent] = field(default_factory=list)

    def deliver(self, reply: Reply) -> None:
        """See `Origin`."""
        columns = None if reply.failures is None else reply.failures.copy()
        self.replies.append(replace(reply, messages=reply.messages.copy(), y=reply.y.copy(), failures=columns))

    def tags(self) -> list[list[int]]:
        """The tags of each reply."""
        return [reply.messages[0].tolist() for reply in self.replies]

    def refuse(self, tag: int, refusal: Refusal) -> None:
        """See `Origin`."""
        self.refusals.append((tag, refusal.code))

    def notify(self, event: StreamEvent) -> None:
        """See `Origin`."""
        self.events.append(event)

    def check_quota(self, streams: int) -> None:
        """See `Origin`."""


class StreamingEngine:
    """An engine with an in-process front end, wired as `server.services` does it.

    Args:
        inline: whether runs are stepped as they begin, and not when the test says so.
        model: what is served.
        states: another access to states than the stepper's, made of it.
        idle: when the reaper ends streams.
        hibernation: when streams leave memory, once there is a recording.
        reap_at_once: streams that one tick of the reaper parks or evicts.
        copy_at_once: states that a request reads or writes before the loop gets its turn.
        limits: sizes, by name; see `make_tables` and `EngineLimits`.
    """

    def __init__(
        self,
        *,
        inline: bool = False,
        model: Model = SMALL,
        states: Callable[[Stepper], StateAccess] | None = None,
        idle: IdleLimits | None = None,
        reap_at_once: int = 4096,
        copy_at_once: int = 4096,
        **limits: int,
    ) -> None:
        size = {
            "max_streams": 12,
            "max_origins": 6,
            "window": 32,
            "max_pending": 512,
            "max_block": 512,
            "credit": 512,
            "max_batch_size": 8,
            "max_queue_delay_ns": 0,
            "max_reply_frames": 64,
            "max_light_batch": 0,
        } | limits
        self.recorder: Recorder | None = None
        self.recording = Path()
        self._model = model
        network = prepared(model).network
        sizes = (
            size["max_streams"],
            size["max_origins"],
            size["window"],
            network.description.features,
            network.description.outputs,
        )
        self.tables = tables = make_tables(*sizes, size["max_pending"], size["max_block"], size["credit"])
        generations = np.arange(1, size["max_streams"] + 2, dtype=np.uint32) * 1000
        generations[::2] += np.uint32(2**31)  # handles from 2^63 on next to smaller ones, as in a server
        self.table = StreamTable(tables, generations)
        self.stepper = Stepper(network, size["max_batch_size"], size["max_streams"], CPU)
        self.hand = HandExecutor(lambda slots, rows: self.stepper.step(slots, rows, tables.x, tables.y), inline)
        self.failures: list[Exception] = []
        """Failed steps, and states that could not be read or written."""
        self.bugs: list[BaseException] = []
        self.loop = Loop(0, self.bugs.append)
        self.tasks = Tasks(self.bugs.append)
        self.origins = Origins(tables)
        self.stats = EngineStats()
        names = ("max_batch_size", "max_queue_delay_ns", "max_reply_frames", "max_light_batch")
        engine_limits = EngineLimits(*(size[name] for name in names))
        self.engine = Engine(
            tables,
            self.table,
            self.origins,
            self.hand,
            Journal(tables, self.table, self.loop.wake),
            engine_limits,
            self.stats,
            EventLog(),
            self._log_failure,
            asyncio.get_running_loop().call_later,
            self.loop.wake,
        )
        self.access: StateAccess = states(self.stepper) if states else self.stepper
        self.load: Callable[[Path, Sequence[int]], list[OpenStream]] = load_open_streams
        """Reads streams that hibernate."""
        tombstones, idle = Tombstones(), idle or IdleLimits(0, PARK_NS, 1000)
        self.states = StreamStates(self.engine, self.access, copy_at_once)
        self.hibernation = Hibernation(
            self.engine,
            self.states,
            tombstones,
            lambda streams: asyncio.to_thread(self.load, self.recording, streams),
            idle,
            self.tasks,
        )
        self.operations = StreamOperations(self.engine, self.states, self.hibernation, self.tasks)
        self.reaper = Reaper(self.engine, self.operations, reap_at_once)
        log = log_into([])
        service = ModelService(
            model.name,
            self.engine,
            self.operations,
            self.reaper,
            self.states,
            Checkpoints(self.engine, self.states, self.tasks, 10**18),
            Listing(self.table, self.hibernation),
            self.tasks,
            log,
            ABOUT,
        )
        self.frontend = InProcessFrontend(service, self.loop.wake)
        self.loop.add(service)
        self.loop.frontends = [self.frontend]
        self.loop.start()

    def record(
        self,
        path: Path,
        *,
        durability: Durability = "commit",
        queue_batches: int = 64,
        second_place: SecondPlace | None = None,
    ) -> Recovery | None:
        """Record from now on, in a new file or in one that is continued; what was continued."""
        header = recording_header(prepared(self._model), config(recording={"path": path, "durability": durability}))
        journal, recovery = self.engine.journal, None
        self.recording = path
        if path.exists():
            writer, recovery = resume_recording(path, header, self.tables, self.table, journal.dirty, self.stepper)
        else:
            writer = RecordingWriter.create(path, header)
        writer.second_place = second_place
        running = asyncio.get_running_loop()

        def on_loop(call: Callable[..., None], *values: object) -> None:
            running.call_soon_threadsafe(call, *values)

        self.recorder = Recorder(
            writer,
            queue_batches,
            on_room=lambda: on_loop(self.loop.wake),
            on_failure=lambda error: on_loop(self.failures.append, error),
            on_durable=lambda lsn: on_loop(journal.advance, lsn),
        )
        last_stream = 0 if recovery is None else recovery.last_stream
        self.hibernation.restarted({} if recovery is None else recovery.hibernated)
        journal.record(self.recorder, last_stream, writer.position, waits=durability != "memory")
        return recovery

    async def durable(self) -> None:
        """Wait until everything that was recorded is committed."""
        await self.engine.journal.committed(self.engine.journal.newest)

    def _log_failure(self, error: Exception, streams: int) -> None:
        self.failures.append(error)

    @property
    def faulty(self) -> FaultyStates:
        """The states that a test breaks."""
        assert isinstance(self.access, FaultyStates)
        return self.access

    def listen(self) -> Listener:
        """Connect an origin that keeps what it is told."""
        listener = Listener()
        assert self.origins.connect(listener)
        return listener

    def submit(self, origin: Listener, tag: int, handles: U64, seqs: list[int], x: F32, acked: int = 0) -> None:
        """Submit one message of x, float32 [T, N, features]; the caller takes a turn."""
        timesteps, width, _ = x.shape
        columns = np.zeros(width, SENT_COLUMN)
        columns["handle"], columns["seq"], columns["acked"] = handles, seqs, acked
        memory = columns.tobytes(), x.astype(np.float32).tobytes()
        self.engine.submit(Frames.of(origin, tag, timesteps, width, *memory, arrived_ns=1))

    async def settle(self) -> None:
        """Let everything happen that does not wait for the executor."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def finish(self, **how: object) -> None:
        """End the oldest run, as `HandExecutor.finish` does, and let what follows happen."""
        self.hand.finish(**how)  # type: ignore[arg-type]
        self.loop.wake()
        await self.settle()

    async def finish_all(self) -> None:
        """End all runs, those that begin meanwhile too."""
        await self.settle()
        while self.hand.begun:
            await self.finish()

    async def all_done(self, *asked: Awaitable[Any]) -> list[Any]:
        """The results of requests and steps that are begun in this order in one go, while runs end as they begin.

        In the place of a result may be the `Refusal` that was raised.
        """
        tasks = [asyncio.ensure_future(each) for each in asked]
        await self.finish_all()
        assert all(task.done() for task in tasks), "one waits for something else than a run"
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Refusal):
                raise result
        return results


@contextlib.asynccontextmanager
async def streaming(**arguments: object) -> AsyncIterator[StreamingEngine]:
    """An engine while the block runs; arguments as for `StreamingEngine`. No bug may have been met."""
    made = StreamingEngine(**arguments)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.loop.stop()
        made.tasks.cancel()
        made.hand.stop()
        if made.recorder is not None:
            made.recorder.stop()
    assert not made.bugs, made.bugs


async def step(
    origin: InProcessOrigin, handles: U64, seqs: Sequence[int], x: F32, acked: Sequence[int] | int = 0
) -> Reply:
    """Step streams by x, float32 [T, N, features]."""
    acks = np.broadcast_to(np.array(acked, np.int64), len(handles))
    return await origin.step(handles, np.array(seqs, np.int64), acks, x)


def failures(reply: Reply) -> list[tuple[int, int, Code, int]]:
    """(column, timestep, code, expected seq) of each column that was not applied as a whole."""
    if reply.failures is None:
        return []
    return [(at, length, Code(code), seq) for at, (code, length, seq) in enumerate(reply.failures.T.tolist()) if code]


def random_frames(rng: np.random.Generator, timesteps: int, columns: int = 1, features: int = 5) -> F32:
    """float32 [T, N, features]."""
    return rng.standard_normal((timesteps, columns, features)).astype(np.float32)
