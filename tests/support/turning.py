"""The server's loop, turned by hand: messages come from a list, answers go into one, the worker works when told."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import structlog

from instep.core.typing import F32, I64, U64
from instep.models.model import Model
from instep.runtime.runs import Ended
from instep.runtime.worker import Job
from instep.server.assembly import make_server
from instep.server.transport import Sent
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind, Message
from tests.support.apart import apart
from tests.support.running import config, prepared


class Turning:
    """A server that never serves by itself; made inside an event loop.

    Args:
        model: what is served.
        sections: keys of the configuration by section.
    """

    endpoint, signal_fd, is_readable = "nowhere", -1, False

    def __init__(self, model: Model, **sections: dict[str, Any]) -> None:
        settings = config(**sections)
        ready = prepared(model, settings.engine.max_batch_size)
        server = self.server = make_server(settings, ready, structlog.get_logger())
        server._router.close()
        server._router = server._postbox._router = self  # type: ignore[assignment]
        self.jobs: deque[Job] = deque()
        server._worker.submit = self.jobs.append  # type: ignore[method-assign, assignment]
        self.arrived: deque[tuple[bytes, list[bytes]]] = deque()
        self.sent: list[tuple[int, list[bytes]]] = []
        """Clients, from 0, with what they were sent."""
        self._request = 0

    # ── As a socket ────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Keep an answer, as bytes of its own."""
        self.sent.append((routing_id[-1], [bytes(frame) for frame in message]))
        return Sent.HANDED_OVER

    def close(self) -> None:
        """Nothing is open."""

    # ── As clients ─────────────────────────────────────────────────────────────────────────────────────────────────

    def says(self, client: int, *message: bytes) -> None:
        """A message is on its way to the server."""
        self.arrived.append((b"\0r" + bytes([client]), list(message)))

    def opens(self, client: int, count: int) -> U64:
        """Say HELLO and open streams; their handles."""
        self.says(client, wire.pack_header(Kind.HELLO, 1, wire.PROTOCOL_VERSION, "turning"))
        names = [f"{client}-{number}" for number in range(count)]
        self.says(client, wire.pack_header(Kind.OPEN, 2, count, 0, 0), wire.pack_names(names), b"", b"")
        self.turn()
        grants = np.frombuffer(self.sent[-1][1][1], wire.GRANT)
        self.sent.clear()
        return grants["handle"].copy()

    def steps(self, client: int, handles: U64, seqs: Sequence[int] | I64, x: F32, acked: Sequence[int] | I64) -> None:
        """A STEP of x float32 [T, N, features] is on its way to the server."""
        self._request += 1
        columns = np.empty(len(handles), wire.COLUMN)
        columns["handle"], columns["seq"], columns["acked"] = handles, seqs, acked
        header = wire.pack_header(Kind.STEP, self._request, *x.shape, "f4")
        self.says(client, header, columns.tobytes(), x.tobytes())

    # ── As the loop ────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, at_once: int = 256) -> None:
        """Take what has arrived, so many messages as one burst: what the pump does, if it has time."""
        while self.arrived:
            for _ in range(min(at_once, len(self.arrived))):
                self.server._verbs.take(*self.arrived.popleft())
            self.server._verbs.admit_taken()

    def turn(self, at_once: int = 256, *, steps: bool = True) -> None:
        """Take what has arrived, and go on until all is answered; without `steps`, as if the worker had done them."""
        self.take(at_once)
        self.server.engine.schedule()
        while self.jobs:
            job = self.jobs.popleft()
            job.done(job.call() if steps or job.step is None else Ended(0, 0, len(job.step[1]), None), None)
            self.server.engine.schedule()

    def answers(self) -> list[tuple[int, list[Any], list[bytes]]]:
        """What was sent since the last time, [client, header, frames] for each request; without times."""
        answers = [
            (client, msgpack.unpackb(one[0]), one[1:]) for client, message in self.sent for one in apart(message)
        ]
        self.sent.clear()
        for _, header, _ in answers:
            if header[0] == Kind.STEPPED:
                header[4:7] = ()
        return answers
