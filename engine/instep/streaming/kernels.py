"""Compiles every kernel of the hot path before the first producer waits for it."""

from __future__ import annotations

import numpy as np

from instep.core.admission import SENT_COLUMN, resolve_handles
from instep.core.runs import are_pending, are_running
from instep.core.streams import StreamTable
from instep.core.tables import make_tables
from instep.core.typing import I64
from instep.runtime.executor import ThreadExecutor
from instep.streaming.api import Frames, Refusal, Reply, StreamEvent
from instep.streaming.engine import Engine, EngineLimits
from instep.streaming.journal import Journal
from instep.streaming.origins import Origins
from instep.streaming.stats import EngineStats, EventLog
from instep_client.protocol.codes import Code


class _Nobody:
    number = -1
    arrival = 0

    def deliver(self, reply: Reply) -> None:
        pass

    def refuse(self, tag: int, refusal: Refusal) -> None:
        pass

    def notify(self, event: StreamEvent) -> None:
        pass

    def check_quota(self, streams: int) -> None:
        pass


def compile_kernels() -> None:
    """Run a stream of a tiny engine through every kernel, with the types that the server uses."""
    tables = make_tables(1, 1, 4, 1, 1, 4, 4, 4)
    table = StreamTable(tables, np.ones(2, np.uint32))
    origins = Origins(tables)
    journal = Journal(tables, table, lambda: None)
    limits = EngineLimits(max_batch_size=1, max_queue_delay_ns=0, max_reply_frames=4)
    engine = Engine(
        tables,
        table,
        origins,
        ThreadExecutor(_step),
        journal,
        limits,
        EngineStats(),
        EventLog(),
        lambda error, streams: None,
        lambda delay_s, call: None,
        lambda: None,
    )
    origin = _Nobody()
    origins.connect(origin)
    slots, _ = table.open(["kernels"], origin.number, 0)
    handles = table.slots.handles(slots)

    def send(seq: int) -> None:
        column = np.array([(handles[0], seq, 0)], SENT_COLUMN).tobytes()
        engine.submit(Frames.of(origin, 1, 2, 1, column, bytes(8), 1))
        engine.admit()

    send(0)
    engine.hold(slots)
    engine.release(slots)
    for _ in range(2):
        engine.schedule()
        while engine.is_running:
            engine.collect()
        engine.flush()
    engine.executor.stop()
    send(1)  # one frame again, and a new one
    engine.fail_pending(slots, Code.STEP_FAILED)
    engine.flush()
    resolve_handles(engine.packed, handles, origin.number, np.empty(1, np.int64), np.empty(1, np.int32))
    are_pending(engine.packed, slots)
    are_running(engine.packed, slots)


def _step(slots: I64, rows: I64) -> None:
    """Compute nothing."""
