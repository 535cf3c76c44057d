from __future__ import annotations

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import F32
from instep_tools.pacing import Stop
from instep_tools.plan import Send, plan_timed
from instep_tools.plan_run import PlanRun
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import FakeServer
from tests.tools.helpers import JumpingClock


async def test_it_waits_for_no_frame_that_it_will_not_send() -> None:
    frames, times_ns = np.zeros((2, 3), np.float32), np.array([0, 100_000_000_000])
    plan = plan_timed(RecordedSequences(("mic",), np.array([2]), frames, times_ns=times_ns), 1.0)
    waits: list[str] = []

    def take(block: Send, result: F32 | Refused) -> None:
        waits.append(run.waits())

    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            run = PlanRun(client, plan, ["mic"], take, Stop(), JumpingClock())
            await run.run(seconds=5)
    assert (run.sent_frames, waits, run.waits()) == (1, [""], "")
