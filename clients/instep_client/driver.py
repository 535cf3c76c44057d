"""Socket, clock and tasks around a session, on one asyncio event loop.

`receive` takes messages in and wakes the tasks that wait for them. `act` does the rest: the session's rules, a new
socket if they want one, messages out. It runs once for all calls of one turn of the loop, so that their frames share a
block. After messages it runs once the tasks that they woke have had their turn. It also runs at the session's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any, Final, TypeVar

import zmq

from instep_client.connection import Call
from instep_client.endpoint import nothing_listens
from instep_client.protocol import multipart
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, ConnectionRefused
from instep_client.protocol.wire import Message
from instep_client.session import Session
from instep_client.sockets import Sockets
from instep_client.streams import StreamHandle

R = TypeVar("R")

_log = logging.getLogger("instep_client")

_SEND_AT: Final = 128
"""Calls of one turn of the loop that are sent before the others are made, so that the server begins with them."""
_FIRST_LOOK_S: Final = 0.05
"""The time without an answer after which the driver checks whether anything listens at the endpoint."""
FAREWELL_S: Final = 1.0


class Driver:
    """Runs one session over one socket. One event loop owns it, from `start` to `stop`.

    Closing waits for up to `farewell_s` until the server has read it.
    """

    def __init__(self, session: Session, farewell_s: float = FAREWELL_S) -> None:
        self._session = session
        self._farewell_s = farewell_s
        self._sockets: Sockets
        self.socket: zmq.Socket[bytes] | None = None
        """Set from `start` to `stop`."""
        self.backlog: deque[Message] = deque()
        """Messages that wait until the socket takes them."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_due = False
        self._asked = 0
        """Calls that were made since the session last acted."""
        self._stopped = False

    async def start(self, wait: bool) -> None:
        """Connect, and wait until the server has welcomed the client.

        Args:
            wait: also for a server that does not listen yet.

        Raises:
            ConnectionRefused: when nothing listens there, unless it is waited for.
            ConnectionFailed: when nobody answers, the endpoint is not valid, or no socket can be made.
            Refused: when the server does not take this client.
            ClientClosed: when it was started or stopped before.
        """
        if self.socket is not None or self._stopped:
            raise ClientClosed("this client was connected before; make a new one to connect again")
        self._loop = asyncio.get_running_loop()
        self._sockets = Sockets.of(self._loop)
        looking: asyncio.Task[None] | None = None
        try:
            self._connect()
            if not wait:
                looking = self._loop.create_task(self._look())
            await self.wait(self._session.greeting)
        except BaseException:
            await self.stop()
            raise
        finally:
            if looking is not None:
                looking.cancel()

    async def stop(self, park: bool = False) -> None:
        """End the session, tell the server unless its streams are to be parked, close the socket.

        May be called twice.
        """
        close_all = self._session.leave(park)
        if self._stopped:
            return
        self._stopped = True
        if self.socket is None:
            return
        try:
            self._act_now()
            if close_all is not None and not close_all.done:
                close_all.waiter = waiter = self._loop.create_future()
                await asyncio.wait((waiter,), timeout=self._farewell_s)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            socket, self.socket = self.socket, None
            self._close(socket)

    async def wait(self, call: Call[R]) -> R:
        """The call's result. If the waiting task is cancelled, the call is cancelled in the session."""
        await self.until_woken(call)
        return call.result()

    async def until_woken(self, call: Call[Any]) -> None:
        """Until the call has ended, or was sent."""
        if call.done:
            return
        call.waiter = waiter = self._loop.create_future()
        self._asked += 1
        if self._asked < _SEND_AT:
            self.wake()
        else:
            self._act_now()
        try:
            await waiter
        except asyncio.CancelledError:
            self._session.cancel(call)
            self.wake()
            raise

    async def wait_news(self, handle: StreamHandle) -> None:
        """Until the stream handle's outputs changed. Many tasks may wait for one stream handle."""
        if handle.waiter is None or handle.waiter.done():
            handle.waiter = self._loop.create_future()
        await asyncio.wait((handle.waiter,))

    def wake(self) -> None:
        """Have the session act in the next turn of the loop."""
        if not self._is_due:
            self._is_due = True
            self._sockets.act_in_next_turn(self._loop, self)

    async def _look(self) -> None:
        """Fail if nothing listens at the endpoint or its host is unknown. A later connection is waited for."""
        await asyncio.sleep(_FIRST_LOOK_S)
        endpoint = self._session.endpoint
        error: type[ConnectionFailed] = ConnectionRefused
        why = f"nothing listens at {endpoint}: start a server there, or correct the endpoint"
        try:
            if not await nothing_listens(endpoint):
                return
        except ConnectionFailed as unknown:
            error, why = ConnectionFailed, str(unknown)
        if not self._session.greeting.done:
            self._session.fail(error, why)
            self.wake()

    def _connect(self) -> None:
        self.socket = self._sockets.connect(self._loop, self._session.endpoint)
        self._loop.add_reader(self.socket.fileno(), self.receive)

    def _close(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(socket.fileno())
        self._sockets.close(self._loop, socket)

    def _reconnect(self, former: zmq.Socket[bytes]) -> None:
        """Replace the socket of a lost connection; unsent requests are asked again."""
        self.backlog.clear()
        try:
            self._connect()
        except ConnectionFailed as error:
            self._session.fail(ConnectionFailed, str(error))
        else:
            self._close(former)

    def receive(self, at_most: int = 1) -> None:
        """Take in messages, and have the session act when the tasks that they wake have had their turn."""
        socket, session = self.socket, self._session
        if socket is None:
            return
        try:
            now = time.monotonic()
            for number in range(at_most):
                if number == 1 and not multipart.ready(socket):
                    break
                frames = multipart.receive_now(socket)
                if not frames:
                    break
                session.receive(frames, now)  # outputs are copied once, to the user's array
                if not session.is_waiting:
                    break  # nothing else is expected, and to ask whether there is more costs more than it finds
        except Exception as error:
            self._fail(error)
        self._wake_tasks()
        if not self._is_due:
            self._is_due = True
            self._sockets.act_after_tasks(self._loop, self)

    def act(self) -> None:
        """Have the session act, and send its messages."""
        self._is_due = False
        self._asked = 0
        if self.socket is None:
            return
        session = self._session
        try:
            now = time.monotonic()
            session.advance(now)
            if session.take_reconnect():
                _log.info("connecting to %s again: %s", session.endpoint, session.attempts.why)
                self._reconnect(self.socket)
            self.backlog.extend(session.outbox.take_messages())
            if self.backlog:
                self._send(self.socket)
            self._set_timer(now)
        except Exception as error:
            self._fail(error)
        if session.outbox.woken:
            self._wake_tasks()

    def _act_now(self) -> None:
        self.act()
        self._sockets.look(self._loop, [self])

    def _on_timer(self) -> None:
        self._timer = None
        self._act_now()

    def _fail(self, error: Exception) -> None:
        """A bug of ours must not leave callers waiting for ever."""
        _log.error("the client failed", exc_info=error)
        self._session.fail(ConnectionFailed, f"the client failed and gave the connection up: {error!r}")

    def _wake_tasks(self) -> None:
        for whom in self._session.outbox.take_woken():
            waiter = whom.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        backlog = self.backlog
        try:
            while backlog:
                multipart.send_now(socket, backlog[0])
                backlog.popleft()
        except zmq.Again:
            pass  # the socket signals when there is room again

    def _set_timer(self, now: float) -> None:
        deadline = self._session.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - now), self._on_timer)
