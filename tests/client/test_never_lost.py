"""Whatever breaks or falls asleep, and wherever: outputs come once, in order, and are those of the network."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from instep_client.connection import State
from instep_client.frames import StepCall, TimedOutputs
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import StreamEvicted
from instep_client.requests import CloseCall
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, RING_INFO, reference
from tests.support.session_link import lasting
from tests.support.states import floats_of

pytestmark = pytest.mark.heavy


class Run:
    """A session, a server, and dice that decide what happens next."""

    def __init__(self, seed: int, window: int, faults: float, busy: float) -> None:
        self.dice = Random(seed)
        self.generator = np.random.default_rng(seed)
        self.link = lasting(replace(RING_INFO, window_frames=window, credit_frames=40), 1e6, seed=seed)
        self.server = self.link.rules
        self.faults = faults
        self.busy = busy
        self.calls: list[StepCall] = []
        self.closings: list[CloseCall] = []
        self.kept: dict[StreamHandle, list[TimedOutputs]] = {}
        session = self.link.session
        opened = [session.open([name], None, single=True) for name in ("a", "b", "c")]
        opened.append(session.open(["d", "e", "f"], None, single=False))
        self.link.run(*opened)
        self.handles = [call.result() for call in opened]

    def submit(self) -> None:
        """The user steps a stream handle."""
        handle = self.dice.choice(self.handles)
        timesteps = self.dice.choice([1, 1, 1, 2, 5])
        rows = None if handle.single else self.dice.sample(range(3), self.dice.randint(1, 3))
        columns = 1 if rows is None else len(rows)
        x = self.generator.standard_normal((timesteps, columns, 3)).astype(np.float32)
        keep = rows is None and self.dice.random() < 0.3
        self.calls.append(self.link.session.step(handle, x[:, 0] if handle.single else x, rows, keep))

    def fault(self) -> None:
        """Something breaks."""
        link = self.link
        match self.dice.randrange(8):
            case 6 | 7:
                if self.server.streams:
                    self.server.hibernate(self.dice.choice(list(self.server.streams)))
            case 0:
                link.cut(noticed=False)
            case 1:
                link.cut()
            case 2:
                self.server.restart()
            case 3:
                self.server.restart()
                link.to_client.clear()
                link.to_server.clear()
            case 4:
                if not self.server.draining:
                    link.send(self.server.shut_down())
                else:
                    self.server.restart()
            case 5:
                self.server.drop(self.dice.choice(list(link.queues)))

    def act(self) -> None:
        """One thing happens somewhere."""
        link = self.link
        if self.dice.random() < self.faults:
            self.fault()
            return
        if self.dice.random() < self.busy:
            self.server.busy.append(True)
        if self.dice.random() < 0.2:
            link.send(self.server.wake())
        match self.dice.randrange(7):
            case 0:
                if not self.closings:
                    self.submit()
            case 1 | 2:
                link.advance()
            case 3 | 4:
                waiting = [peer for peer, messages in link.queues.items() if messages]
                if waiting:  # those of a former socket may arrive late
                    link.serve(1, self.dice.choice(waiting))
            case 5 if link.to_client:
                link.deliver()
            case _:
                link.advance(self.dice.choice([0.0, 0.01, 0.1, 1.0, 11.0]))
        self.check_closings()
        for handle in self.handles:
            while (call := link.session.take(handle)) is not None:
                self.kept.setdefault(handle, []).append(call.result())

    def drain(self) -> None:
        """Nothing breaks any more, and everything is answered."""
        self.server.busy.clear()
        if self.server.draining:
            self.server.restart()
        self.link.run(*self.calls, *self.closings)

    def close(self) -> None:
        """The user closes every stream handle, whatever of it is unanswered; nothing is sent after that."""
        self.closings = [self.link.session.close(handle) for handle in self.handles]

    def check_closings(self) -> None:
        """No stream ends before everything that was sent through it is answered."""
        for closing in self.closings:
            if closing.done:
                assert all(call.done for call in self.calls if call.handle is closing.handle)

    def check(self) -> None:
        """Every frame was applied once, in order, and its output given once, in order."""
        assert self.link.session.state in ((State.OPEN, State.RECONNECTING) if self.closings else (State.OPEN,))
        assert all(call.done and call.error is None for call in self.calls)
        for handle in self.handles:
            for row, name in zip(handle.rows.tolist(), handle.names, strict=True):
                sent: list[F32] = []
                came: list[F32] = []
                for call in self.calls:
                    if call.handle is handle and row in call.rows:
                        column = call.rows.tolist().index(row)
                        sent += list(call.x[:, column])
                        outputs = call.result().outputs.reshape(len(call.x), len(call.rows), 2)
                        came += list(outputs[:, column])
                expected, final = reference(np.array(sent, np.float32).reshape(-1, 3))
                applied = (self.server.closed if self.closings else self.server.streams)[name].applied
                assert np.array_equal(np.array(applied).reshape(-1, 3), np.array(sent).reshape(-1, 3))
                assert np.array_equal(np.array(came, np.float32).reshape(-1, 2), expected)
                for closing in self.closings:
                    if closing.handle is handle:
                        self.check_final(closing, final, handle.rows.tolist().index(row))
        assert self.closings or int(self.link.session.table.columns[:, 1].sum()) == int(
            self.link.session.table.columns[:, 2].sum()
        )

    def check_final(self, closing: CloseCall, final: F32, column: int) -> None:
        """A stream's state came with its end, unless the reply to the first CLOSE was lost."""
        if closing.error is not None:
            assert isinstance(closing.error, StreamEvicted)
            assert closing.error.code is Code.UNKNOWN_STREAM
            return
        (state,) = floats_of(closing.result()[column : column + 1], 4)
        assert np.isnan(state).all() or np.array_equal(state, final.reshape(-1))


SEEDS = [range(100), pytest.param(range(100, 3000), marks=pytest.mark.long)]


def run_of(seed: int, faults: list[float]) -> Run:
    dice = Random(seed)
    return Run(seed, dice.choice([1, 2, 5, 16]), dice.choice(faults), dice.choice([0.0, 0.1]))


@pytest.mark.parametrize("seeds", SEEDS)
def test_no_fault_of_connections_or_servers_is_seen_by_the_calls(seeds: range) -> None:
    for seed in seeds:
        run = run_of(seed, [0.02, 0.1, 0.3])
        for _ in range(200):
            run.act()
        run.drain()
        run.check()
        for handle, answers in run.kept.items():
            kept = [call for call in run.calls if call.handle is handle and call.keep]
            assert all(a is call.result() for a, call in zip(answers, kept, strict=False))


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_close_behind_unanswered_frames_costs_none_of_their_outputs(seeds: range) -> None:
    for seed in seeds:
        run = run_of(seed, [0.0, 0.02, 0.1, 0.3])
        for _ in range(50):
            run.act()
        run.close()
        for _ in range(100):
            run.act()
        run.drain()
        run.check()
        run.check_closings()
