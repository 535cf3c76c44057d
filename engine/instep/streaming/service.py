"""The service of one model: its engine, and everything that manages its streams."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog

from instep.core.tables import CREDIT_STALLS, RECEIVED_FRAMES, REPEATED_FRAMES
from instep.recording.database import bytes_on_disk
from instep.recording.recorder import Recorder
from instep.streaming.engine import Engine
from instep.streaming.listing import Listing
from instep.streaming.operations import Reaper, StreamOperations
from instep.streaming.states import Checkpoints, StreamStates
from instep.streaming.stats import EventLog, History
from instep.streaming.tasks import Tasks
from instep.streaming.verification import Verification
from instep_client.protocol.codes import Code


@dataclass(frozen=True, slots=True)
class About:
    """Facts about a model that are known from the start."""

    fingerprint: str
    kind: str
    device: str
    exactness: Literal["exact", "tolerance"]
    """Whether a frame has the same bits in every batch and on every processor."""
    arithmetic: str
    """See `RecordingHeader.arithmetic`."""
    features: int
    outputs: int
    max_streams: int
    durability: Literal["memory", "commit", "fsync"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of continuing a recording."""

    streams: int
    """The number of reopened streams, which are parked or hibernate until they are resumed."""
    frames: int
    """The number of frames that were stepped again."""
    seconds: float
    last_stream: int
    """The highest stream number in the recording."""
    hibernated: dict[str, int]
    """Streams that were not loaded, because none of their frames had to be stepped again: name → number."""
    checkpoint_position: int
    """Up to this position the recovery read only rows that still count; 0 if it read all rows."""


@dataclass(slots=True, eq=False)
class ModelService:
    """A model with its own memory, streams, executor and recording.

    The loop takes its turns, and front ends connect origins to it. It knows no other service, so it can be added to a
    running server and removed from it.
    """

    name: str
    """The name, which is unique in a server."""
    engine: Engine
    operations: StreamOperations
    reaper: Reaper
    states: StreamStates
    checkpoints: Checkpoints
    listing: Listing
    tasks: Tasks
    """Requests, and other coroutines that wait for this engine or its recording."""
    log: structlog.stdlib.BoundLogger
    """It names the model in every line if the server has several."""
    about: About
    steps_apart: bool = False
    """Whether it steps in another process, which polling cannot keep waiting for the interpreter's lock."""
    file: Path | None = None
    """The file of its recording."""
    folder: Path = Path()
    """The folder of the model."""
    recorder: Recorder | None = None
    recovery: Recovery | None = None
    """The result of continuing an older recording, if there was one."""
    verification: Verification | None = None
    """Findings of the process that checks the recording; None without live verification."""
    server_began_ns: int = field(default_factory=time.monotonic_ns)
    """The start of the server, on the monotonic clock."""
    is_former: bool = False
    """Whether another version has replaced it, so it ends with its last connection."""
    leaves: str = ""
    """The reason for refusing new work, if the server continues without this model."""
    history: History = field(init=False)
    """The numbers of the last ten minutes."""
    _logged: dict[Code, int] = field(default_factory=dict)
    """Refusals by code that were added to the events."""

    def __post_init__(self) -> None:
        self.history = History(self._counted, self.engine.stats.durations())

    @property
    def events(self) -> EventLog:
        """The newest events of its streams."""
        return self.engine.events

    @property
    def is_quiet(self) -> bool:
        """Whether everything submitted is answered, and nothing waits."""
        return self.engine.is_quiet and self.engine.journal.is_quiet and not len(self.tasks)

    @property
    def is_unused(self) -> bool:
        """Whether it has neither connections nor streams, in memory or elsewhere."""
        engine = self.engine
        return not (len(engine.origins) or engine.table.open_count or self.operations.hibernation or len(self.tasks))

    @property
    def is_ready(self) -> bool:
        """Whether new streams and frames are accepted."""
        return not (self.engine.draining or self.engine.journal.has_failed)

    def drain(self, leaves: str = "") -> None:
        """Refuse everything new; `leaves` is the reason if only this model ends, and empty if the server ends."""
        self.engine.draining, self.leaves = True, leaves

    def end_streams(self) -> None:
        """Begin to close all streams, unless a recording keeps them, and notify their owners."""
        if not self.engine.journal.is_recording:
            slots = self.engine.table.open_slots()
            self.operations.evict(slots[~self.engine.table.closing[slots]], Code.UNLOADED)

    def tick(self, now_ns: int) -> None:
        """Do periodic work."""
        self.reaper.tick(now_ns)
        self.checkpoints.take_if_due()
        if self.history.sample(now_ns):
            self._log_refusals()

    def _log_refusals(self) -> None:
        refusals = self.engine.stats.refusals()
        for code, count in refusals.items():
            if more := count - self._logged.get(code, 0):
                self.events.add("refused", detail=f"{code.name} × {more}")
        self._logged = refusals

    def numbers(self) -> dict[str, float]:
        """All numbers by name; `recent_` marks the newest row of the history."""
        return self._counted() | {f"recent_{name}": value for name, value in self.history.newest().items()}

    def _counted(self) -> dict[str, float]:
        engine, table, counts = self.engine, self.engine.table, self.engine.tables.counts
        return {
            "ready": float(self.is_ready),
            "exact": float(self.about.exactness == "exact"),
            "server_uptime_s": (time.monotonic_ns() - self.server_began_ns) / 1e9,
            **engine.stats.values(),
            "received_frames_total": float(counts[RECEIVED_FRAMES]),
            "repeated_frames_total": float(counts[REPEATED_FRAMES]),
            "credit_stalls_total": float(counts[CREDIT_STALLS]),
            "step_time_ratio": self.history.lately("executor_busy"),
            "connections": float(len(engine.origins)),
            "streams_open": float(table.open_count),
            "streams_parked": float(table.owned[table.parked]),
            "streams_hibernated": float(len(self.operations.hibernation)),
            "frames_pending": float(engine.pending_frames),
            **self._recorded(),
            **({} if self.verification is None else self.verification.numbers()),
        }

    def _recorded(self) -> dict[str, float]:
        if self.file is None:
            return {}
        numbers = {
            "recording_bytes": float(bytes_on_disk(self.file)),
            "checkpoint_age_s": (time.monotonic_ns() - self.checkpoints.taken_ns) / 1e9,
            "replay_s": self.engine.journal.computed_ns / 1e9,
        }
        if self.recovery is not None:
            numbers["recovery_s"] = self.recovery.seconds
        if self.recorder is not None and (is_copied := self.recorder.uses_second_place) is not None:
            numbers["copied"] = float(is_copied)
        return numbers
