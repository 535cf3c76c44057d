"""Socket, clock and tasks around a session, on one asyncio event loop.

Everything happens in `_pump`: messages in, the session's rules, a new socket if they want one, messages out, waiters
woken. It runs when a message came, when a task asked for something (once for all tasks of one turn of the loop, which
is how their frames come to share a block), and when the session's deadline has come.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import zmq

from instep_client.calls import Call
from instep_client.endpoint import EXAMPLES, nothing_listens
from instep_client.pending import MAX_REPLY_BYTES
from instep_client.protocol import multipart
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, ConnectionRefused
from instep_client.protocol.wire import Message
from instep_client.session import Session
from instep_client.steps import StepCall
from instep_client.streams import StreamHandle

R = TypeVar("R")

_log = logging.getLogger("instep_client")

_RECEIVE_BURST: Final = 256
"""Messages taken before other tasks get their turn."""
_FIRST_LOOK_S: Final = 0.05
"""How long a server may take to answer before it is looked whether anything listens at its endpoint."""
_FAREWELL_S: Final = 1.0
"""The longest that closing waits for the server to have read it."""
_SOCKET_OPTIONS: Final = {
    zmq.LINGER: 0,  # closing waits for the server's PONG instead, so that nothing ever blocks the event loop
    zmq.IPV6: 1,
    zmq.PROBE_ROUTER: 1,  # ZeroMQ reconnects in silence; the server answers its first message with HELLO_FIRST
    zmq.IMMEDIATE: 1,  # without it only the first connection begins with that message
    zmq.RECONNECT_IVL: 50,  # milliseconds, and up to as many again, drawn at random
    zmq.MAXMSGSIZE: MAX_REPLY_BYTES,
    zmq.RCVHWM: 65_536,  # replies: never more than the requests that the server's credit allows
    zmq.HEARTBEAT_IVL: 5_000,
    zmq.HEARTBEAT_TIMEOUT: 15_000,  # we give a silent server up after this
    zmq.HEARTBEAT_TTL: 15_000,  # and it us, even if it sends no heartbeats of its own
}


class Driver:
    """Runs one session over one socket. One event loop owns it, from `start` to `stop`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._socket: zmq.Socket[bytes] | None = None
        self._backlog: deque[Message] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._pump_is_due = False
        self._stopped = False

    async def start(self, wait: bool) -> None:
        """Connect, and wait until the server has welcomed the client.

        Args:
            wait: also for a server that does not listen yet.

        Raises:
            ConnectionRefused: when nothing listens there, unless it is waited for.
            ConnectionFailed: when nobody answers, the endpoint is none, or no socket can be made.
            Refused: when the server does not take this client.
            ClientClosed: when it was started or stopped before.
        """
        if self._socket is not None or self._stopped:
            raise ClientClosed("this client was connected before; make a new one to connect again")
        self._loop = asyncio.get_running_loop()
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
        await self._until_woken(call)
        return call.result()

    async def wait_sent(self, call: StepCall) -> None:
        """Until the call was sent, or failed before it could be.

        Raises:
            InstepError: whatever it failed with.
        """
        await self._until_woken(call)
        if not call.sent:
            call.result()

    async def wait_news(self, handle: StreamHandle) -> None:
        """Until the stream handle's outputs changed. Many tasks may wait for one stream handle."""
        waiter = handle.waiter
        if not isinstance(waiter, asyncio.Future) or waiter.done():
            handle.waiter = waiter = self._loop.create_future()
        await asyncio.wait((waiter,))

    def wake(self) -> None:
        """Have the pump run once in the next turn of the loop."""
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

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
        try:
            self._socket = socket = _open_socket(self._loop)
        except zmq.ZMQError as error:
            raise ConnectionFailed(f"this process cannot make a socket: {error}") from None
        for option, value in _SOCKET_OPTIONS.items():
            socket.set(option, value)
        try:
            socket.connect(self._session.endpoint)
        except zmq.ZMQError as error:
            raise ConnectionFailed(
                f"{self._session.endpoint!r} is no endpoint that can be reached ({error}): write {EXAMPLES}"
            ) from None
        self._loop.add_reader(socket.fileno(), self._pump)

    def _close(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(socket.fileno())
        socket.close()
        _give_back_context(self._loop)

    def _reconnect(self, former: zmq.Socket[bytes]) -> None:
        """Another socket in place of the one whose connection is lost; what was not sent will be asked anew."""
        self._backlog.clear()
        try:
            self._connect()
        except ConnectionFailed as error:
            self._session.fail(ConnectionFailed, str(error))
        if self._socket is not former:  # also where the other one was made and could not be connected
            self._close(former)

    async def _until_woken(self, call: Call[Any]) -> None:
        if call.done:
            return
        call.waiter = waiter = self._loop.create_future()
        self.wake()
        try:
            await waiter
        except asyncio.CancelledError:
            self._session.cancel(call)
            self.wake()
            raise

    def _pump(self) -> None:
        self._pump_is_due = False
        if self._socket is None or self._socket.closed:
            return
        try:
            self._exchange(self._socket)
        except Exception as error:  # a bug of ours must not leave callers waiting for ever
            _log.exception("the client failed")
            self._session.fail(ConnectionFailed, f"the client failed and gave the connection up: {error!r}")
        for whom in self._session.take_woken():
            waiter = whom.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _exchange(self, socket: zmq.Socket[bytes]) -> None:
        session = self._session
        now = time.monotonic()
        for frames in multipart.received(socket, _RECEIVE_BURST):  # outputs are copied once, to the user's array
            session.receive([frame.buffer for frame in frames], now)
        session.advance(now)
        if session.take_reconnect():
            _log.info("connecting to %s again: %s", session.endpoint, session.loss)
            self._reconnect(socket)
            socket = self._socket or socket
        self._backlog.extend(session.take_messages())
        try:
            while self._backlog:
                multipart.send_now(socket, self._backlog[0])
                self._backlog.popleft()
        except zmq.Again:
            pass  # the socket signals when there is room again
        deadline = session.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - now), self._on_timer)
        # The socket signals once, and what was done above may have used the signal up.
        if multipart.events(socket) & (multipart.READABLE_OR_WRITABLE if self._backlog else multipart.READABLE):
            self.wake()

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()


@dataclass(slots=True)
class _Shared:
    context: zmq.Context[zmq.Socket[bytes]]
    sockets: int = 0


_contexts: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()
"""One context a loop, for all its clients (each costs two threads), as long as any of them is open."""


def _open_socket(loop: asyncio.AbstractEventLoop) -> zmq.Socket[bytes]:
    shared = _contexts.get(loop)
    if shared is None:
        shared = _contexts[loop] = _Shared(zmq.Context())
        shared.context.set(zmq.MAX_SOCKETS, int(shared.context.get(zmq.SOCKET_LIMIT)))
    try:
        socket = shared.context.socket(zmq.DEALER)
    except zmq.ZMQError:
        if not shared.sockets:
            del _contexts[loop]
            shared.context.term()
        raise
    shared.sockets += 1
    return socket


def _give_back_context(loop: asyncio.AbstractEventLoop) -> None:
    shared = _contexts[loop]
    shared.sockets -= 1
    if shared.sockets == 0:
        del _contexts[loop]
        shared.context.term()
