"""Streams that hibernate on the server: they are resumed before anything is sent to them, and nobody notices."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from instep_client.arrays import NOBODY, Indices
from instep_client.handles import TurnRequest
from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.wire import GrantArray
from instep_client.replies import ColumnError
from instep_client.streams import OpenStreams

_RETRY_S: Final = 0.5
"""How long to wait where the server has no room for a stream that hibernates."""
_LATER: Final = frozenset({Code.TOO_MANY_STREAMS, Code.STEP_FAILED})
"""Why a stream that hibernates may not wake now, and may later."""

EndedRows = dict[tuple[Code, str], list[int]]
"""Rows of streams that have ended, by reason."""


class Sleepers:
    """Which streams that hibernate are waited for, and when they are claimed. The table's `asleep` says which do."""

    def __init__(self, table: OpenStreams) -> None:
        self._table = table
        self.held: dict[TurnRequest, Indices] = {}
        """Which of their streams requests wait for."""
        self._wanted: set[int] = set()
        """Rows that somebody has waited for since the last claims."""
        self._claimed: set[int] = set()
        self.resuming: set[str] = set()
        """Names that the user has asked to resume: a claim sent after that would fence what the user is granted."""
        self.again_at = math.inf
        """When to ask `due` again though no message comes."""

    def wake(self, rows: Indices) -> bool:
        """Have those of these streams claimed that hibernate; whether there are any.

        Who waits for them asks again in every `advance` of the session, until there are none.
        """
        asleep = rows[self._table.asleep[rows]]
        self._wanted.update(asleep.tolist())
        return len(asleep) > 0

    def hold(self, request: TurnRequest, which: Indices) -> None:
        """Have streams claimed for a request, which is told of them as they wake: there may not be room for all."""
        held = self.held.get(request, NOBODY)
        self.held[request] = np.concatenate([held, which])

    def due(self, now: float) -> Indices:
        """The rows of streams that are to be claimed now."""
        for request, which in list(self.held.items()) if self.held else ():
            rows = request.handle.rows[which]
            asleep = self._table.asleep[rows]
            self._wanted.update(rows[asleep].tolist())
            if not asleep.all():
                self.held[request] = which[asleep]
                if not asleep.any():
                    del self.held[request]
                request.woke(which[~asleep])
        if now < self.again_at < math.inf:
            return NOBODY
        self.again_at = math.inf
        if not self._wanted:
            return NOBODY
        rows = np.array(sorted(self._wanted - self._claimed), np.int64)
        rows = rows[self._table.asleep[rows]]
        if self.resuming:
            rows = rows[[name not in self.resuming for name in self._table.names(rows)]]
        self._claimed.update(rows.tolist())
        self._wanted.clear()
        return rows

    def granted(
        self, rows: Indices, grants: GrantArray, failures: list[ColumnError], asked_at: int, now: float
    ) -> EndedRows:
        """RESUMED came for some of this client's streams: take their handles; those that have ended.

        Streams that had ended before are left alone, and so are those that were given their rows since `asked_at`, on
        the session's counter.

        Streams that the server has no room for, or cannot read now, hibernate and can be claimed later.

        A server that has less of a stream than was given of it is refused here when it did not notice: of frames whose
        outputs came out of order only the first missing one was named in the claim.
        """
        table = self._table
        self._claimed.difference_update(rows.tolist())
        ended: EndedRows = {}
        is_open = table.open_since(rows, asked_at)
        for column, _, code, sentence, expected in failures:
            row = int(rows[column])
            if not is_open[column]:
                continue
            if code in _LATER:
                table.sleep(rows[column : column + 1])
                self.again_at = now + _RETRY_S
                continue
            table.server_has[row] = expected
            ended.setdefault((code, sentence), []).append(row)
        is_granted = is_open & (grants["handle"] != 0)
        rows = rows[is_granted]
        table.resumed(rows, grants[is_granted])
        for row, next_seq in zip(rows.tolist(), grants["next_seq"][is_granted].tolist(), strict=True):
            if next_seq < table.given(row):
                table.server_has[row] = next_seq
                ended.setdefault((Code.DATA_LOSS, SENTENCES[Code.DATA_LOSS]), []).append(row)
        return ended

    def refused(self, rows: Indices, again_at: float) -> None:
        """The server could not take a claim now."""
        self._claimed.difference_update(rows.tolist())
        self.again_at = again_at if self.again_at == math.inf else max(again_at, self.again_at)

    def lost(self) -> list[TurnRequest]:
        """The connection is lost, and with it what was asked; the requests that waited, to be asked anew."""
        held = list(self.held)
        self.held.clear()
        self._wanted.clear()
        self._claimed.clear()
        self.resuming.clear()
        self.again_at = math.inf
        return held
