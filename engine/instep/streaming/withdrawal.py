"""The withdrawal of `exact` when a recheck finds a frame that was served with other bits than another bucket gives."""

from __future__ import annotations

from typing import Final

import numpy as np
import structlog

from instep.runtime.recheck import Mismatch, Recheck
from instep.streaming.engine import Engine

_EVERY_S: Final = 10.0
"""The least time between two mismatches that are logged."""


class Withdrawal:
    """Looks at what rechecks have found, counts it, and says so in the log and in the engine's recording."""

    def __init__(self, recheck: Recheck, engine: Engine, log: structlog.stdlib.BoundLogger) -> None:
        self._recheck = recheck
        self._engine = engine
        self._log = log
        self._next_s = 0.0

    def tick(self, now_s: float) -> str | None:
        """Look; why `exact` was withdrawn if that was now, else None."""
        stats, recheck = self._engine.stats, self._recheck
        stats.rechecked_frames_total = recheck.frames
        stats.recheck_mismatches_total = recheck.mismatches
        stats.recheck_failures_total = recheck.failures
        mismatch = recheck.take_mismatch()
        if mismatch is None:
            return None
        stream = self._stream(mismatch)
        where = f"{mismatch.part}[{mismatch.element}] in batches of {mismatch.bucket} and {mismatch.other_bucket}"
        if now_s >= self._next_s:
            self._next_s = now_s + _EVERY_S
            self._engine.events.add("mismatch", stream or "", where, mismatch.seq)
            self._log.error(
                "bits differ",
                stream=stream,
                seq=mismatch.seq,
                batch_sizes=(mismatch.bucket, mismatch.other_bucket),
                value=f"{mismatch.part}[{mismatch.element}]",
                served=mismatch.served,
                rechecked=mismatch.again,
                mismatches=recheck.mismatches,
            )
        if not stats.is_exact:
            return None
        stats.is_exact = False
        self._engine.journal.withdraw_exact()
        reason = (
            f"frame {mismatch.seq} of stream {stream!r} has other bits in batches of {mismatch.other_bucket} than in "
            f"those of {mismatch.bucket}, which served it"
        )
        self._engine.events.add("withdrawn", stream or "", reason, mismatch.seq)
        self._log.error("exactness withdrawn", exactness="tolerance", reason=reason)
        return reason

    def _stream(self, mismatch: Mismatch) -> str | None:
        """The name of its stream; None where that was closed meanwhile."""
        table = self._engine.table
        slots, incarnations = np.array([mismatch.slot]), np.array([mismatch.incarnation], np.uint32)
        return table.name(mismatch.slot) if table.are_open(slots, incarnations).all() else None
