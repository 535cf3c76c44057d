"""Socket, clock and tasks around a session, on one asyncio event loop.

`receive` takes messages in and wakes the tasks that wait for them. `act` does the rest: the session's rules, a new
socket if they want one, messages out. It runs once for all calls of one turn of the loop, so that their frames share a
block. After messages it runs once the tasks that they woke have had their turn. It also runs at the session's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import socket as system_socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import zmq
from zmq.utils.monitor import recv_monitor_message

from instep_client.arguments import EXAMPLES
from instep_client.connection import MAX_REPLY_BYTES, OPEN, Call
from instep_client.frames import StepCall
from instep_client.key_files import ClientKeys
from instep_client.protocol import wire
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, ConnectionRefused
from instep_client.protocol.wire import Message
from instep_client.session import Session
from instep_client.streams import StreamHandle

R = TypeVar("R")

_log = logging.getLogger("instep_client")

OPTIONS: Final = {
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

_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_RECEIVE_BURST: Final = 256
"""The number of messages read from one socket before other tasks get their turn."""
_SEND_AT: Final = 128
"""The number of calls in one turn of the loop after which they are sent, so that the server can begin with them."""
_FIRST_LOOK_S: Final = 0.05
"""The time without an answer after which the driver checks whether anything listens at the endpoint."""
FAREWELL_S: Final = 1.0
_LAG_WINDOW_S: Final = 30.0
_WARN_LAG_S: Final = 0.5
_WARN_EVERY_S: Final = 60.0


class Driver:
    """Runs one session over one socket. One event loop owns it, from `start` to `stop`.

    Closing waits for up to `farewell_s` until the server has read it.
    """

    def __init__(self, session: Session, keys: ClientKeys | None = None, farewell_s: float = FAREWELL_S) -> None:
        self.session = session
        self._keys = keys
        self._monitor: zmq.Socket[bytes] | None = None
        """Tells of handshakes that fail, until there is a connection."""
        self._farewell_s = farewell_s
        self._sockets: Sockets
        self.socket: zmq.Socket[bytes] | None = None
        self.backlog: deque[Message] = deque()
        """Messages that wait until the socket accepts them."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_due = False
        self._asked = 0
        """Calls that were made since the session last acted."""
        self._stopped = False

    async def start(self, wait: bool) -> None:
        """Connect, and wait until the server has welcomed the client.

        Args:
            wait: whether to wait for a server that does not listen yet.

        Raises:
            ConnectionRefused: when nothing listens there, unless it is waited for.
            ConnectionFailed: when nobody answers, the endpoint is not valid, or no socket can be made.
            Refused: when the server refuses this client.
            ClientClosed: when it was started or stopped before.
        """
        if self.socket is not None or self._stopped:
            raise ClientClosed("this client was connected before; make a new one to connect again")
        looking: asyncio.Task[None] | None = None
        try:
            self.begin()
            if not wait:
                looking = self._loop.create_task(self._look())
            await self.wait(self.session.greeting)
        except BaseException:
            await self.stop()
            raise
        finally:
            if looking is not None:
                looking.cancel()

    def begin(self) -> None:
        """Connect without waiting for the server.

        Raises:
            ConnectionFailed: when the endpoint is not valid, or no socket can be made.
        """
        self._loop = asyncio.get_running_loop()
        self._sockets = Sockets.of(self._loop)
        self._connect()
        self.wake()

    async def stop(self, park: bool = False) -> None:
        """End the session, notify the server unless its streams are to be parked, and close the socket.

        May be called twice.
        """
        close_all = self.session.leave(park)
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
            self._end_monitor(socket)
            self._close(socket)

    async def wait(self, call: Call[R]) -> R:
        """Wait for the call's result. If the waiting task is cancelled, the call is cancelled in the session."""
        await self.until_woken(call)
        return call.result()

    async def until_answered(self, call: StepCall, timeout_s: float | None, since: float | None = None) -> None:
        """Wait until a step has ended: with StepTimeout after this time since now, or since a time of the loop."""
        if timeout_s is None:
            await self.until_woken(call)
            return
        due = (self._loop.time() if since is None else since) + timeout_s
        timer = self._loop.call_at(due, self._time_out, call, timeout_s)
        try:
            await self.until_woken(call)
        finally:
            timer.cancel()

    def _time_out(self, call: StepCall, timeout_s: float) -> None:
        if not call.done:
            call.time_out(timeout_s)
            _wake(call)
            self.wake()  # what waited behind it may be sent

    async def until_woken(self, call: Call[Any]) -> None:
        """Wait until the call has ended or was sent."""
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
            self.session.cancel(call)
            self.wake()
            raise

    async def wait_news(self, handle: StreamHandle) -> None:
        """Wait until the handle's outputs have changed. Many tasks may wait for one handle."""
        if handle.waiter is None or handle.waiter.done():
            handle.waiter = self._loop.create_future()
        await asyncio.wait((handle.waiter,))

    @property
    def loop_lag_s(self) -> float:
        """The longest delay of the event loop's turns in the last 30 to 60 seconds."""
        return max(self._sockets.lags)

    def wake(self) -> None:
        """Have the session act in the next turn of the loop."""
        if not self._is_due:
            self._is_due = True
            self._sockets.act_in_next_turn(self._loop, self)

    async def _look(self) -> None:
        """Fail if nothing listens at the endpoint or its host is unknown. A later connection is waited for."""
        await asyncio.sleep(_FIRST_LOOK_S)
        endpoint = self.session.endpoint
        error: type[ConnectionFailed] = ConnectionRefused
        why = f"nothing listens at {endpoint}: start a server there, or correct the endpoint"
        try:
            if not await nothing_listens(endpoint):
                return
        except ConnectionFailed as unknown:
            error, why = ConnectionFailed, str(unknown)
        if not self.session.greeting.done:
            self.session.fail(error, why)
            self.wake()

    def _connect(self) -> None:
        self.socket, self._monitor = self._sockets.connect(self._loop, self.session.endpoint, self._keys)
        self._loop.add_reader(self.socket.fileno(), self.receive)
        self._loop.add_reader(self._monitor.fileno(), self._on_handshake_failed)
        self._on_handshake_failed()  # a socket signals only what comes after it was found empty

    def _on_handshake_failed(self) -> None:
        while self._monitor is not None and wire.ready(self._monitor):
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            why, is_final = _why_handshake_failed(event["event"], event["value"], self._keys, self.session.endpoint)
            self.session.handshake_failed(why, is_final=is_final)
        self.wake()

    def _end_monitor(self, socket: zmq.Socket[bytes]) -> None:
        if self._monitor is not None:
            self._loop.remove_reader(self._monitor.fileno())
            socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None

    def _close(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(socket.fileno())
        self._sockets.close(self._loop, socket)

    def _reconnect(self, former: zmq.Socket[bytes]) -> None:
        """Replace the socket of a lost connection; unsent requests are asked again."""
        self.backlog.clear()
        self._end_monitor(former)
        try:
            self._connect()
        except ConnectionFailed as error:
            self.session.fail(ConnectionFailed, str(error))
        else:
            self._close(former)

    def receive(self, at_most: int = 1) -> None:
        """Process messages, and have the session act once the tasks that they wake have had their turn."""
        socket, session = self.socket, self.session
        if socket is None:
            return
        try:
            now = time.monotonic()
            for number in range(at_most):
                if number == 1 and not wire.ready(socket):
                    break
                frames = wire.receive_now(socket)
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
        session = self.session
        try:
            now = time.monotonic()
            session.advance(now)
            if self._monitor is not None and session.state is OPEN:
                self._end_monitor(self.socket)
                if session.attempts.number:
                    _log.warning("connected again to %s", session.endpoint)
            if session.take_reconnect():
                attempts = session.attempts
                level = logging.WARNING if attempts.number == 1 else logging.INFO
                _log.log(level, "trying to connect again for %g s: %s", attempts.reconnect_s, attempts.why)
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
        # a bug of the client must not leave its callers waiting for ever
        _log.error("the client failed", exc_info=error)
        self.session.fail(ConnectionFailed, f"the client failed and gave the connection up: {error!r}")

    def _wake_tasks(self) -> None:
        for woken in self.session.outbox.take_woken():
            _wake(woken)

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        backlog = self.backlog
        try:
            while backlog:
                wire.send_now(socket, backlog[0])
                backlog.popleft()
        except zmq.Again:
            pass  # the socket signals when there is room again

    def _set_timer(self, now: float) -> None:
        deadline = self.session.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - now), self._on_timer)


def _wake(woken: Call[Any] | StreamHandle) -> None:
    waiter = woken.waiter
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _why_handshake_failed(event: int, status: int, keys: ClientKeys | None, endpoint: str) -> tuple[str, bool]:
    """A sentence, and whether another handshake would fail, too.

    Without detail, something accepts connections and ends them, as a server does that ends.
    """
    is_final = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and status == 400:  # of ZAP: it does not know the key
        return f"the server at {endpoint} does not know this client's key: its operator can add it to peers_file", True
    if keys is None:
        cure = "give key_file and server_key, or set INSTEP_KEY_FILE and INSTEP_SERVER_KEY"
        return (f"the server at {endpoint} wants a key: {cure}" if is_final else ""), is_final
    why = "is not the one whose key you gave as server_key, or it has no keys, or something else answers there"
    return f"the server at {endpoint} {why}", is_final


async def nothing_listens(endpoint: str) -> bool:
    """Whether the operating system refuses connections to an endpoint, or its socket file is missing.

    ZeroMQ does not report this, because it retries forever. A host that drops packets can only be detected by waiting,
    and this function waits no longer than the operating system does.

    Raises:
        ConnectionFailed: if the host name is unknown.
    """
    loop = asyncio.get_running_loop()
    addresses: list[tuple[int, Any]]
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        addresses = [(system_socket.AF_UNIX, f"\0{path[1:]}" if path.startswith("@") else path)]
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        try:
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=system_socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if ";" not in host and getattr(error, "errno", None) == system_socket.EAI_NONAME:
                raise ConnectionFailed(
                    f"the host name in {endpoint} is not known on this machine: correct the endpoint"
                ) from None
            return False  # ZeroMQ may know more forms, as `eth0;host:port`, and some failures pass
        addresses = [(family, address) for family, _, _, _, address in found]
    is_refused = False
    for family, address in addresses:
        try:
            with system_socket.socket(family, system_socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                await loop.sock_connect(probe, address)
                return False
        except (ConnectionRefusedError, FileNotFoundError):
            is_refused = True
        except OSError:  # an address family that this machine does not have
            continue
    return is_refused


class Sockets:
    """The sockets of one event loop's clients. It does not keep the loop alive, and is forgotten with it."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, int(self._context.get(zmq.SOCKET_LIMIT)))
        self._open = 0
        self._due: list[Driver] = []
        self._after_tasks: list[Driver] = []
        self._asked_at = 0.0
        self.lags = (0.0, 0.0)
        """The longest delay of a turn in the window of time before this one, and in this one."""
        self._window_ends_at = self._warn_at = 0.0

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> Sockets:
        """The sockets of a loop. The caller connects one, if none is open, before anything else happens in the loop."""
        sockets = shared.get(loop)
        if sockets is None:
            sockets = shared[loop] = Sockets()
        return sockets

    def connect(
        self, loop: asyncio.AbstractEventLoop, endpoint: str, keys: ClientKeys | None
    ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """A new socket, to be closed with `close`, and a monitor of its handshakes that fail.

        Raises:
            ConnectionFailed: if the endpoint is invalid, or no socket can be made.
        """
        self._open += 1
        try:
            socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            self._end_unless_used(loop)
            raise ConnectionFailed(f"this process cannot make a socket: {error}") from None
        for option, value in OPTIONS.items():
            socket.set(option, value)
        if keys is not None:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in keys)
        monitor: zmq.Socket[bytes] | None = None
        try:
            monitor = socket.get_monitor_socket(_HANDSHAKE_FAILED)  # before the first handshake
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            if monitor is not None:
                monitor.close()
            self.close(loop, socket)
            raise ConnectionFailed(
                f"{endpoint!r} is no endpoint that can be reached ({error}): write {EXAMPLES}"
            ) from None
        return socket, monitor

    def close(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes]) -> None:
        """Close a socket that `connect` made."""
        socket.close()
        self._end_unless_used(loop)

    def act_in_next_turn(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        """Have a client act in the next turn of the loop, together with all others that asked for it."""
        self._due.append(driver)
        if len(self._due) == 1:
            self._ask_turn(loop)

    def act_after_tasks(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        """Have a client act one turn of the loop later, after the tasks that are being woken now."""
        self._after_tasks.append(driver)
        if len(self._after_tasks) == 1:
            loop.call_soon(self._pass_on, loop)

    def look(self, loop: asyncio.AbstractEventLoop, drivers: Sequence[Driver]) -> None:
        """Check which sockets are ready after their clients acted, because acting may use up a socket's signal."""
        by_socket: dict[Any, Driver] = {driver.socket: driver for driver in drivers if driver.socket is not None}
        wanted = [
            (socket, wire.READABLE_OR_WRITABLE if driver.backlog else wire.READABLE)
            for socket, driver in by_socket.items()
        ]
        readable = []
        for socket, events in zmq.zmq_poll(wanted, 0):
            if events & wire.READABLE:
                readable.append(by_socket[socket])
            else:
                by_socket[socket].wake()
        if readable:
            loop.call_soon(self._receive, readable)

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        after_tasks, self._after_tasks = self._after_tasks, []
        if not self._due:
            self._ask_turn(loop)
        self._due += after_tasks

    def _ask_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asked_at = time.monotonic()
        loop.call_soon(self._take_turn, loop)

    def _note_lag(self, now: float) -> None:
        lag_s = now - self._asked_at
        if now >= self._window_ends_at:
            self.lags = self.lags[1] if now < self._window_ends_at + _LAG_WINDOW_S else 0.0, 0.0
            self._window_ends_at = now + _LAG_WINDOW_S
        if lag_s > self.lags[1]:
            self.lags = self.lags[0], lag_s
        if lag_s > _WARN_LAG_S and now >= self._warn_at:
            self._warn_at = now + _WARN_EVERY_S
            _log.warning(
                "the event loop was held up for %.1f s by other work in it, and frames were late: do work that takes "
                "long in another thread or process, or share the streams among several processes",
                lag_s,
            )

    def _take_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._note_lag(time.monotonic())
        due, self._due = self._due, []
        for driver in due:
            driver.act()
        self.look(loop, due)

    @staticmethod
    def _receive(drivers: Sequence[Driver]) -> None:
        for driver in drivers:
            driver.receive(_RECEIVE_BURST)

    def _end_unless_used(self, loop: asyncio.AbstractEventLoop) -> None:
        self._open -= 1
        if self._open == 0:
            del shared[loop]
            self._context.term()


shared: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Sockets]] = WeakKeyDictionary()
"""`Sockets` by loop, while any client of the loop has a socket."""
