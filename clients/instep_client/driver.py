"""Socket, clock and tasks around a session, on one asyncio event loop.

`_on_readable` takes messages in and wakes the tasks that wait for them. `_pump` does the rest: the session's rules, a
new socket if they want one, messages out. It runs once for everything that the tasks of one turn of the loop asked for,
so that their frames share a block. After messages came it runs when the tasks that they woke have had their turn. It
also runs when the session's deadline has come.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

import zmq

from instep_client.calls import Call
from instep_client.endpoint import nothing_listens
from instep_client.protocol import multipart
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, ConnectionRefused
from instep_client.protocol.wire import Message
from instep_client.session import Session
from instep_client.sockets import Sockets
from instep_client.steps import StepCall
from instep_client.streams import StreamHandle

R = TypeVar("R")

_log = logging.getLogger("instep_client")

_SEND_AT: Final = 128
"""Calls of one turn of the loop that are sent before the others are made, so that the server begins with them."""
_RECEIVE_BURST: Final = 256
"""Messages taken before other tasks get their turn."""
_FIRST_LOOK_S: Final = 0.05
"""How long a server may take to answer before it is looked whether anything listens at its endpoint."""
_FAREWELL_S: Final = 1.0
"""The longest that closing waits for the server to have read it."""


class Driver:
    """Runs one session over one socket. One event loop owns it, from `start` to `stop`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sockets: Sockets
        self._socket: zmq.Socket[bytes] | None = None
        self._backlog: deque[Message] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_due = False
        self._asked = 0
        """Calls that were made since the session last acted."""
        self._burst = 1
        """Messages to take at once. Most connections get one at a time; more are taken where there were more."""
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
        if self._socket is not None or self._stopped:
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
        if self._socket is None:
            return
        try:
            self._pump()
            if close_all is not None and not close_all.done:
                close_all.waiter = waiter = self._loop.create_future()
                await asyncio.wait((waiter,), timeout=_FAREWELL_S)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._close(self._socket)

    async def wait(self, call: Call[R]) -> R:
        """The call's result. When the waiting task is cancelled, the session is told that nobody waits."""
        await self.until_woken(call)
        return call.result()

    async def wait_sent(self, call: StepCall) -> None:
        """Until the call was sent, or failed before it could be.

        Raises:
            InstepError: whatever it failed with.
        """
        await self.until_woken(call)
        if not call.sent:
            call.result()

    async def until_woken(self, call: Call[Any]) -> None:
        """Until the call has ended, or was sent."""
        if call.done:
            return
        call.waiter = waiter = self._loop.create_future()
        self._asked += 1
        if self._asked < _SEND_AT:
            self.wake()
        else:
            self._pump()
        try:
            await waiter
        except asyncio.CancelledError:
            self._session.cancel(call)
            self.wake()
            raise

    async def wait_news(self, handle: StreamHandle) -> None:
        """Until the stream handle's outputs changed. Many tasks may wait for one stream handle."""
        waiter = handle.waiter
        if not isinstance(waiter, asyncio.Future) or waiter.done():
            handle.waiter = waiter = self._loop.create_future()
        await asyncio.wait((waiter,))

    def wake(self) -> None:
        """Have the session act in the next turn of the loop."""
        if not self._is_due:
            self._is_due = True
            self._sockets.call_in_next_turn(self._loop, self._pump)

    async def _look(self) -> None:
        """Fail if nothing listens at the endpoint. A later connection is waited for: servers are restarted."""
        await asyncio.sleep(_FIRST_LOOK_S)
        endpoint = self._session.endpoint
        if await nothing_listens(endpoint) and not self._session.greeting.done:
            self._session.fail(
                ConnectionRefused, f"nothing listens at {endpoint}: start a server there, or correct the endpoint"
            )
            self.wake()

    def _connect(self) -> None:
        self._socket = self._sockets.connect(self._loop, self._session.endpoint)
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def _close(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(socket.fileno())
        self._sockets.close(self._loop, socket)

    def _reconnect(self, former: zmq.Socket[bytes]) -> None:
        """Another socket in place of the one whose connection is lost; what was not sent will be asked anew."""
        self._backlog.clear()
        try:
            self._connect()
        except ConnectionFailed as error:
            self._session.fail(ConnectionFailed, str(error))
        else:
            self._close(former)

    def _on_readable(self) -> None:
        self._guard(self._receive)
        if not self._is_due:
            self._is_due = True
            self._sockets.call_after_tasks(self._loop, self._pump)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _pump(self) -> None:
        self._is_due = False
        self._asked = 0
        self._guard(self._act)

    def _guard(self, work: Callable[[zmq.Socket[bytes]], None]) -> None:
        """Do what is to be done with the socket, and wake whom it concerns."""
        if self._socket is None or self._socket.closed:
            return
        try:
            work(self._socket)
        except Exception as error:  # a bug of ours must not leave callers waiting for ever
            _log.exception("the client failed")
            self._session.fail(ConnectionFailed, f"the client failed and gave the connection up: {error!r}")
        for whom in self._session.pending.take_woken():
            waiter = whom.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        session = self._session
        now = time.monotonic()
        for frames in multipart.received(socket, self._burst):  # outputs are copied once, to the user's array
            session.receive([frame.buffer for frame in frames], now)

    def _act(self, socket: zmq.Socket[bytes]) -> None:
        session = self._session
        now = time.monotonic()
        session.advance(now)
        if session.take_reconnect():
            _log.info("connecting to %s again: %s", session.endpoint, session.attempts.why)
            self._reconnect(socket)
            socket = self._socket or socket
        self._backlog.extend(session.pending.take_messages())
        if self._backlog:
            self._send(socket)
        self._set_timer(now)
        # The socket signals once, and the work since then may have used the signal up.
        found = multipart.ready(socket, multipart.READABLE_OR_WRITABLE if self._backlog else multipart.READABLE)
        self._burst = _RECEIVE_BURST if found & multipart.READABLE else 1
        if found & multipart.READABLE:
            self._loop.call_soon(self._on_readable)
        elif found:
            self.wake()

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        backlog = self._backlog
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
