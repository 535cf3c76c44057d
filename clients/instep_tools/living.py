"""Stepping a group some of whose streams the server may have ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from instep_client.aio_streams import AsyncGroup
from instep_client.protocol.errors import FrameFailure, FramesRefused, Refused, StreamEvicted
from instep_client.protocol.wire import F32
from instep_tools.plan import Rows


async def step_living(group: AsyncGroup, x: F32, rows: Rows, outputs: int) -> F32:
    """Step those of the streams that are still open.

    Args:
        group: whose streams.
        x: float32 [T, N, features].
        rows: [N] which of its streams.
        outputs: numbers in an output.

    Returns:
        float32 [T, N, outputs].

    Raises:
        FramesRefused: when some were not applied, or some streams have ended; its `outputs` hold the others'.
    """
    living: npt.NDArray[np.bool_] = np.ones(len(rows), np.bool_)
    y = np.full((*x.shape[:2], outputs), np.nan, np.float32)
    why: Refused | None = None
    failures: tuple[FrameFailure, ...] = ()
    while living.any():
        try:
            y[:, living] = await group.step(x[:, living], rows=rows[living])
        except StreamEvicted as ended:
            row = group.names.index(ended.stream)
            living[np.flatnonzero(rows == row)] = False
            seq = int(group.next_seqs[row])
            failures += (FrameFailure(ended.stream, seq, ended.code, seq),)
            why = why or ended
            continue  # nothing was sent: the others go without it, before anything else is sent
        except FramesRefused as refused:
            y[:, living] = refused.outputs
            failures += refused.failures
            why = why or refused
        break
    if why is not None:
        raise FramesRefused(why.code, why.sentence, failures, y)
    return y
