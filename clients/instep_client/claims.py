"""Claims on streams that are this client's already: after the loss of a connection, or because they hibernated."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.outbox import Outbox, parts
from instep_client.protocol import wire
from instep_client.protocol.wire import CLAIM, Code, GrantArray, Kind
from instep_client.replies import ColumnError
from instep_client.streams import ACKED, OpenStreams

_LATER: Final = frozenset({Code.TOO_MANY_STREAMS, Code.STEP_FAILED})
"""Why a stream that hibernates may not wake now, and may later."""


def ask_for_own(table: OpenStreams, outbox: Outbox, rows: Indices, max_message_bytes: int) -> int:
    """Claim streams, saying what has come of them; how many messages that takes."""
    pieces = parts(len(rows), max_message_bytes // max(wire.MAX_NAME_BYTES + 1, CLAIM.itemsize))
    for piece in pieces:
        part = rows[piece]
        claims = np.zeros(len(part), CLAIM)
        claims["have"] = table.columns[part, ACKED]
        claims["epoch"] = table.epoch[part]
        names = wire.pack_names(table.names(part))
        outbox.ask(Kind.RESUME, None, len(part), 0, frames=[names, claims.tobytes()], part=part)
    return len(pieces)


def take_grants(
    table: OpenStreams, part: Indices, grants: GrantArray, failures: list[ColumnError]
) -> dict[tuple[Code, str], list[int]]:
    """RESUMED came for some streams: take their handles; the rows of those that have ended, by reason.

    Streams that the server has no room for, or cannot read now, hibernate and can be claimed later.

    A server that has less of a stream than was given of it is refused here when it did not notice: of frames whose
    outputs came out of order only the first missing one was named in the claim.
    """
    ended: dict[tuple[Code, str], list[int]] = {}
    for failure in failures:
        row = int(part[failure.column])
        if failure.code in _LATER:
            table.sleep(part[failure.column : failure.column + 1])
            continue
        table.server_has[row] = failure.expected_seq
        ended.setdefault((failure.code, failure.sentence), []).append(row)
    granted = grants["handle"] != 0
    rows = part[granted]
    table.resumed(rows, grants[granted])
    for row, next_seq in zip(rows.tolist(), grants["next_seq"][granted].tolist(), strict=True):
        if next_seq < table.given(row):
            table.server_has[row] = next_seq
            ended.setdefault((Code.DATA_LOSS, wire.SENTENCES[Code.DATA_LOSS]), []).append(row)
    return ended
