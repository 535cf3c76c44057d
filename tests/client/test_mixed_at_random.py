"""Resumes, closes, reads and hibernation in any order: every call ends, and no frame goes astray."""

from __future__ import annotations

import contextlib
from random import Random
from typing import Any

import numpy as np
import pytest

from instep_client.connection import Call, State
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import Kind
from instep_client.requests import Opening
from instep_client.streams import StreamHandle
from tests.support.fake_server import evicted
from tests.support.session_link import lasting
from tests.support.step_messages import parts

pytestmark = pytest.mark.heavy

ACTIONS = {
    "step": 8,
    "read": 2,
    "close": 1,
    "resume": 2,
    "open": 2,
    "hibernate": 6,
    "end": 1,
    "wake": 8,
    "wake_none": 2,
    "advance": 12,
    "serve": 14,
    "deliver": 12,
    "overtake": 2,
    "cut": 1,
}
"""How often each is done."""
NAMES = "abcdef"


class Chance:
    """What happens to a session at random. Every number in a frame says which stream it is for."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.link = lasting(seed=seed)
        self.handles: list[StreamHandle] = [self.link.open("a"), self.link.open("b", "c")]
        self.calls: list[Call[Any]] = []
        self.openings: list[Opening] = []
        """Those of the calls that have not ended yet, or only just."""

    def act(self) -> None:
        """Do one thing, if it can be done now."""
        (action,) = self.rng.choices(list(ACTIONS), list(ACTIONS.values())) if self.handles else ["open"]
        with contextlib.suppress(InstepError):
            getattr(self, action)()
        opened = [call.result() for call in self.openings if call.done and not call.error]
        self.openings = [call for call in self.openings if not call.done]
        self.handles = [handle for handle in dict.fromkeys([*self.handles, *opened]) if not handle.closed]

    def settle(self) -> None:
        """All that hibernate wake and nothing breaks, for a minute in which nobody says much at a time."""
        end = self.link.now + 60
        while self.link.now < end:
            self.link.advance(0.25)
            waiting = len(self.link.to_server)
            for _ in range(waiting):
                self.link.serve(1)
            self.wake()
            if not waiting and not self.link.to_client:
                self.link.now = max(self.link.now, min(end, self.link.session.deadline() or end) - 0.25)
            self.link.settle_client()

    def step(self) -> None:
        handle = self.rng.choice(self.handles)
        numbers = [NAMES.index(name) + 1 for name in handle.names]
        x = np.repeat(np.array(numbers, np.float32)[:, None], 3, axis=1)
        self.calls.append(self.link.session.step(handle, x[0] if handle.single else x))

    def read(self) -> None:
        self.calls.append(self.link.session.read_state(self.rng.choice(self.handles)))

    def close(self) -> None:
        self.calls.append(self.link.session.close(self.rng.choice(self.handles)))

    def resume(self) -> None:
        name = self.rng.choice(list(self.link.rules.streams) or NAMES)
        self.begin(self.link.session.resume([name], None, 0, True, True))

    def open(self) -> None:
        self.begin(self.link.session.open([self.rng.choice(NAMES)], None, True))

    def begin(self, opening: Opening) -> None:
        self.calls.append(opening)
        self.openings.append(opening)

    def hibernate(self) -> None:
        owned = [name for name, stream in self.link.rules.streams.items() if stream.owner is not None]
        if owned:
            self.link.rules.hibernate(self.rng.choice(owned))

    def end(self) -> None:
        if self.link.rules.streams:
            name = self.rng.choice(list(self.link.rules.streams))
            self.link.to_client.append(evicted([self.link.rules.streams[name].handle], Code.IDLE))
            self.link.rules.expire(name)

    def wake(self) -> None:
        self.link.send(self.link.rules.wake())

    def wake_none(self) -> None:
        self.link.send(self.link.rules.wake(self.rng.choice([Code.TOO_MANY_STREAMS, Code.STEP_FAILED])))

    def advance(self) -> None:
        self.link.advance(self.rng.choice([0.0, 0.0, 0.3]))

    def serve(self) -> None:
        if self.link.to_server:
            self.link.serve(1)

    def deliver(self) -> None:
        if self.link.to_client:
            self.link.deliver()

    def overtake(self) -> None:
        """OPENED arrives before a RESUMED that was on its way."""
        waiting = self.link.to_client
        for index in range(1, len(waiting)):
            if [parts(waiting[place])[0][0] for place in (index - 1, index)] == [Kind.RESUMED, Kind.OPENED]:
                waiting[index - 1], waiting[index] = waiting[index], waiting[index - 1]

    def cut(self) -> None:
        self.link.cut(noticed=self.rng.random() < 0.5)


@pytest.mark.parametrize("seeds", [range(400), pytest.param(range(400, 20_000), marks=pytest.mark.long)])
def test_every_call_ends_and_every_frame_is_applied_to_its_stream(seeds: range) -> None:
    for seed in seeds:
        chance = Chance(seed)
        for _ in range(60):
            chance.act()
        chance.settle()
        server, session = chance.link.rules, chance.link.session
        assert session.state is State.OPEN, seed
        assert all(call.done for call in chance.calls), seed
        for stream in [*server.streams.values(), *server.closed.values()]:
            assert all((x == NAMES.index(stream.name) + 1).all() for x in stream.applied), seed
