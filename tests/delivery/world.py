"""Clients, network, server and disk together, moved step by step; checked after each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np

from instep.core.typing import U8, U64
from instep.recording.errors import RecordingError
from instep.recording.schema import Durability
from instep.runtime.executor import StateLost
from instep.streaming.api import Names, Origin
from instep_client.protocol.wire import Kind, Message
from tests.delivery.client import ModelClient
from tests.delivery.disk import Disk
from tests.delivery.lives import Asked, Is, Lane, Violation, require
from tests.delivery.network import Connection, Network
from tests.delivery.node import Node, Sizes
from tests.delivery.recurrence import StepFailure
from tests.delivery.truth import Truth
from tests.support.states import floats_of
from tests.support.step_messages import apart, parts

CLIENTS = 2
_ROUNDS = 80
_QUIET_ROUNDS = 200


class World:
    """One example.

    Args:
        durability: what the server promises.
        sizes: of the server.
    """

    def __init__(self, durability: Durability, sizes: Sizes) -> None:
        self.disk = Disk(durability)
        self.network = Network()
        self.truth = Truth(self.disk, self.network, sizes.window)
        self.network.on_sent = self._leaves
        self.network.on_received = self._arrives
        self._sizes = sizes
        self._lives = count(1)
        self._copies: list[list[bytes]] = []
        self._taken: list[Asked] = []
        """STEPs that the server has taken and not admitted yet."""
        self.node: Node | None = None
        self.start()
        self.clients = [ModelClient(number, self.truth, self.network) for number in range(CLIENTS)]

    def _leaves(self, connection: Connection, message: Message) -> None:
        for one in apart([bytes(frame) for frame in message]):
            self.truth.leaves(connection, [*one])

    # ── The network ────────────────────────────────────────────────────────────────────────────────────────────────

    def deliver_to_server(self, connection: Connection, at_most: int = 99, *, is_taken: bool = True) -> bool:
        """Messages arrive, and the loop takes them now or in its next turn; whether there were any."""
        if self.node is None or connection.is_partitioned or not connection.to_server:
            return False
        for _ in range(min(at_most, len(connection.to_server))):
            self.node.arrives(connection, connection.to_server.popleft())
        if is_taken:
            self.turn()
        return True

    def _arrives(self, connection: Connection, message: list[bytes]) -> None:
        kind, request = parts(message)[0][:2]
        asked = self.truth.asked.get((connection.owner, request))
        if asked is None:
            return
        if kind == Kind.STEP:
            self._taken.append(asked)
            if len(self._taken) > 1:
                self.truth.seen.add("several STEPs at once")
        elif kind == Kind.RESUME:
            is_copy = any(message is copy for copy in self._copies)
            self.truth.resume_arrives(connection, asked, is_copy=is_copy)

    # ── As the server moves ────────────────────────────────────────────────────────────────────────────────────────

    def admits(self, admit: Callable[[], None]) -> None:
        """See `Watcher`."""
        taken, self._taken = self._taken, []
        before = self.truth.before_steps(taken)
        admit()
        self.truth.after_steps(taken, before)

    def resumes(self, origin: Origin, names: Names, have: U64) -> None:
        """See `Watcher`."""
        self.truth.before_resume(names, have.tolist())

    def resets(self, origin: Origin, handles: U64, states: U8 | None) -> None:
        """See `Watcher`."""
        values = np.zeros(len(handles)) if states is None else floats_of(states, 1)[:, 0]
        self.truth.before_reset(origin, handles.tolist(), [int(value) for value in values])

    def reads(self, origin: Origin, handles: U64, copies: Names = ()) -> None:
        """See `Watcher`."""
        self.truth.before_read(origin, handles.tolist(), copies)

    def has_moved(self) -> None:
        """See `Watcher`."""
        self.truth.note_changes()

    def deliver_to_client(self, connection: Connection, at_most: int = 99) -> bool:
        """Whether anything was delivered."""
        delivered = False
        for _ in range(at_most):
            if connection.is_partitioned or not connection.to_client:
                break
            message = connection.to_client.popleft()
            delivered = True
            client = self.clients[connection.owner]
            if connection is client.connection:
                for one in apart([bytes(frame) for frame in message]):
                    client.receive([*one])
        return delivered

    def drop(self, connection: Connection, *, of_server: bool) -> None:
        """The oldest message on its way is lost."""
        queue = connection.to_client if of_server else connection.to_server
        if queue:
            queue.popleft()
            self.truth.seen.add("dropped")

    def duplicate(self, connection: Connection, *, of_server: bool) -> None:
        """The oldest message on its way arrives once more, now or behind the others."""
        if of_server:
            if connection.to_client:
                connection.to_client.append(list(connection.to_client[0]))
        elif connection.to_server:
            copy = list(connection.to_server[0])
            self._copies.append(copy)
            connection.to_server.append(copy)

    def cut(self, connection: Connection, *, server_notices: bool) -> None:
        """The connection breaks; its client connects again when it does."""
        connection.cut()
        if server_notices and self.node is not None:
            self.node.notice_gone(connection)

    # ── The server ─────────────────────────────────────────────────────────────────────────────────────────────────

    def work(self, runs: int) -> None:
        """The executor steps some runs, and the loop learns of everything that has happened."""
        if self.node is not None:
            for _ in range(runs):
                self.node.executor.work()
                self.node.run()
            self.node.learn_what_is_durable()
        self.turn()

    def turn(self) -> None:
        """The loop does everything that there is to do."""
        if self.node is not None:
            self.node.run()
            self._note_failure()

    def commit(self, *, is_told: bool) -> None:
        """The recorder writes what waits; the loop learns of it now or later."""
        if self.node is not None:
            self.node.recorder.commit()
            if is_told:
                self.node.learn_what_is_durable()
                self.node.run()
            self._note_failure()

    def tick(self) -> None:
        """The server does what is due now and then."""
        if self.node is not None:
            self.node.tick()
            self.turn()

    def fail_step(self, *, loses_state: bool, after: int = 0) -> None:
        """The next step fails, or the one after so many."""
        if self.node is not None:
            self.node.stepper.failure = StateLost("lost") if loses_state else StepFailure("failed")
            self.node.stepper.steps_before_failure = after

    def expire(self) -> None:
        """All parked streams have waited too long."""
        if self.node is not None:
            self.node.expire_parked()
            self.turn()

    def hibernate(self) -> None:
        """All streams that do nothing have done nothing for long."""
        if self.node is not None:
            self.node.hibernate()
            self.turn()

    def checkpoint(self) -> None:
        if self.node is not None:
            self.node.checkpoint()
            self.turn()

    def _note_failure(self) -> None:
        """A server whose recorder has failed ends."""
        if self.node is not None and self.node.has_failed:
            self.truth.seen.add("the disk was full")
            self.crash(power_lost=0)
            self.disk.broken = False

    def all_goes_well(self) -> None:
        """All messages are delivered and answered, but for what takes longer than usual."""
        for connection in list(self.network.connections):
            self.deliver_to_server(connection)
        self.work(3)
        self.commit(is_told=True)
        for connection in list(self.network.connections):
            self.deliver_to_client(connection)

    # ── Crash and start ────────────────────────────────────────────────────────────────────────────────────────────

    def crash(self, power_lost: int) -> None:
        """The server dies; with it the machine, and the newest transactions, where `power_lost` is not 0."""
        if self.node is None:
            return
        self.truth.seen.add("power lost" if power_lost else "killed")
        node, self.node, self.truth.node = self.node, None, None
        node.kill()
        if power_lost:
            self.disk.lose_power(power_lost)
        durability = self.disk.durability
        may_lose = durability == "memory" or (durability == "commit" and power_lost > 0)
        self._taken.clear()
        self.truth.crashed(may_lose=may_lose)
        for connection in self.network.connections:
            connection.rename()

    def start(self) -> None:
        """Start the server, unless it runs."""
        if self.node is None:
            self.node = Node(next(self._lives), self.disk, self.network, self._sizes, self)
            self.truth.started(self.node, self.disk.next_seqs())

    def start_damaged(self, where: int, bit: int) -> None:
        """One bit on the disk turns over; the server does not start, or nobody can tell."""
        if self.node is not None:
            return
        rows = [(table, key) for table, found in sorted(self.disk.image.items()) for key in found]
        if not rows:
            return
        table, key = rows[where % len(rows)]
        row = self.disk.image[table][key]
        blobs = [at for at, column in enumerate(row) if isinstance(column, bytes) and column]
        damaged = list(row)
        at = blobs[bit % len(blobs)] if blobs else 0
        if blobs:
            damaged[at] = bytearray(damaged[at])
            damaged[at][bit // 8 % len(damaged[at])] ^= 1 << bit % 8
            damaged[at] = bytes(damaged[at])
        else:
            at = len(row) - 2
            damaged[at] = damaged[at] + "?" if isinstance(damaged[at], str) else (damaged[at] or 0) ^ 1
        expected = self.disk.next_seqs()
        self.disk.image[table][key] = tuple(damaged)
        try:
            self.node = Node(next(self._lives), self.disk, self.network, self._sizes, self)
        except RecordingError:
            self.truth.seen.add("damage was refused")
        else:
            self.truth.seen.add("damage was harmless")
        finally:
            self.disk.image[table][key] = row
        if self.node is None:
            self.start()
        else:
            self.truth.started(self.node, expected)

    # ── In the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """What holds after every step."""
        self.truth.check_frame_buffer()

    def settle(self) -> None:
        """The faults are over: everything that was sent is answered.

        Raises:
            Violation: when it is not.
        """
        self.disk.broken = False
        self.start()
        for connection in self.network.connections:
            connection.is_partitioned = False
        for _ in range(_ROUNDS):
            self._until_quiet()
            self.check()
            if self._is_settled():
                self.truth.check_names()
                return
            for client in self.clients:
                self._go_on(client)
        states = [
            (lane.name, lane.state, lane.have, len(lane.line))
            for client in self.clients
            for lane in client.lanes.values()
        ]
        raise Violation(f"not everything was answered: {states}")

    def _until_quiet(self) -> None:
        for _ in range(_QUIET_ROUNDS):
            moved = False
            self.start()
            assert self.node is not None
            self.node.stepper.failure = None
            for connection in list(self.network.connections):
                moved |= self.deliver_to_server(connection)
                moved |= self.deliver_to_client(connection)
            moved |= bool(self.node.executor.begun)
            self.tick()
            self.work(2)
            moved |= self.node is None or self.node.recorder.has_work
            self.commit(is_told=True)
            if not moved:
                require(self.node is None or not len(self.node.tasks), "an operation waits for ever")
                return
        raise Violation("the server and its clients never come to rest")

    def _is_settled(self) -> bool:
        return all(self._lane_is_settled(lane) for client in self.clients for lane in client.lanes.values())

    def _lane_is_settled(self, lane: Lane) -> bool:
        if lane.state is Is.OPEN:
            return lane.is_answered and lane.new_state is None
        return lane.state is Is.NOTHING or (lane.state is Is.REFUSED and self._is_held(lane.name))

    def _is_held(self, name: str) -> bool:
        return any(client.lanes[name].state is Is.OPEN for client in self.clients)

    def _go_on(self, client: ModelClient) -> None:
        lanes = client.lanes.values()
        if client.connection.is_cut or any(lane.waits for lane in lanes):
            client.reconnect()
            return
        for lane in lanes:
            if lane.state is Is.OPEN:
                client.send([lane], self._sizes.window, anew=True, politely=True)
            elif lane.state is Is.REFUSED and not self._is_held(lane.name):
                client.take_over(lane)
