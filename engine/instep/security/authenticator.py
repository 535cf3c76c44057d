"""The authenticator: answers ZeroMQ when it asks whether a key may connect (ZAP), and bounds the number of strangers.

ZeroMQ asks through a socket at a fixed address. A thread answers there and reads the monitor of the server's socket:
ZeroMQ stops when nobody reads that. A stranger is a connection that has not said HELLO.
"""

from __future__ import annotations

import contextlib
import math
import socket as socketlib
import threading
import time
from collections import Counter
from typing import Any, Final, TypeAlias

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from instep.security.principals import Principals

MAX_STRANGERS: Final = 2048
"""Each takes up to 14 KiB in ZeroMQ. Beyond it the oldest is disconnected, or the newest while all are younger than
`_GRACE_S`: after a restart, all clients of a server are strangers for a moment."""
_MAX_EVENTS: Final = 2000
"""Events that ZeroMQ keeps until they are read; then it accepts nothing more."""
MAX_FILES: Final = MAX_STRANGERS + _MAX_EVENTS
_GRACE_S: Final = 5.0
_LOOK_MS: Final = 100
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_GOODBYE_S: Final = 0.5
"""The time in which a connection that is dismissed gets what was sent to it."""
_DOMAIN: Final = b"instep"
_FAILURES: Final = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "without_keys",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "unknown_key",
}
_REASONS: Final = {zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "wrong_server_key", 500: "failed"}
"""By the event's value, where that says more: 500 is an answer of `_answer` after a bug."""
_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | sum(_FAILURES)

Connection: TypeAlias = tuple[int, int]
"""A descriptor, and the count of connections before, because the system uses descriptors again."""


class Authenticator:
    """Lets connections in whose keys are of `principals`, and disconnects strangers that stay.

    Args:
        socket: a ROUTER that is not bound yet.
        secret_key: the server's, in Z85.
        principals: who may connect; may be replaced at any time.
        timeout_s: the time in which a connection has to say HELLO.
    """

    def __init__(self, socket: zmq.Socket[bytes], secret_key: str, principals: Principals, timeout_s: float) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, any key may connect while nobody answers
        self.principals = principals
        self._timeout_s = timeout_s
        self._questions: zmq.Socket[bytes] = socket.context.socket(zmq.REP)
        self._questions.bind("inproc://zeromq.zap.01")
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(_EVENTS)
        self._place: object = None
        """The port or path that is listened at."""
        self._lock = threading.Lock()
        self._accepted = 0
        self._open: dict[int, int] = {}
        """The numbers of connections, by descriptor."""
        self._strangers: dict[int, float] = {}
        """When each is disconnected, by descriptor, the oldest first."""
        self._failures: Counter[str] = Counter()
        self._unknown = {"key": "", "address": ""}
        self._bug: dict[str, Exception] = {}
        self._reported_s, self._pause_s = -math.inf, 0.0
        self._looked_s = 0.0
        self._thread = threading.Thread(target=self._run, name="instep-authenticator", daemon=True)

    def start(self, endpoint: str) -> None:
        """Answer from now on: the socket is bound."""
        self._place = int(endpoint.rpartition(":")[2]) if endpoint[:3] == "tcp" else endpoint.removeprefix("ipc://")
        self._thread.start()

    def close(self) -> None:
        """Close the sockets, where it was not started; otherwise the end of the context ends it."""
        self._questions.close(linger=0)
        self._monitor.close(linger=0)

    @property
    def is_alive(self) -> bool:
        """Whether it answers; if not, nobody can connect any more."""
        return self._thread.is_alive()

    def welcome(self, descriptor: int) -> Connection:
        """A connection says HELLO: it is no stranger any more."""
        with self._lock:
            self._strangers.pop(descriptor, None)
            return descriptor, self._open.get(descriptor, 0)

    def dismiss(self, connection: Connection) -> None:
        """Disconnect a connection in a moment, unless it has ended."""
        descriptor, number = connection
        with self._lock:
            if self._open.get(descriptor) == number:
                self._strangers[descriptor] = time.monotonic() + _GOODBYE_S

    def failures(self) -> dict[str, Any]:
        """Count the handshakes that failed since the last report, by reason; while they go on, reports grow rare.

        Handshakes that ended because the client hung up are not among them.
        It also has the last unknown key with its address, and the last bug, each if there was one.
        """
        now_s = time.monotonic()
        if now_s - self._reported_s < self._pause_s or not self._failures:
            return {}
        goes_on = now_s - self._reported_s < 2 * _LONGEST_PAUSE_S
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S) if goes_on else _FIRST_PAUSE_S
        failures, self._failures, self._reported_s = self._failures, Counter(), now_s
        bug, self._bug = self._bug, {}
        return {**failures, **(self._unknown if "unknown_key" in failures else {}), **bug}

    # ── In the thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        awaited = [(socket, zmq.POLLIN) for socket in (self._questions, self._monitor)]
        with contextlib.suppress(zmq.ContextTerminated), self._questions, self._monitor:
            while True:
                zmq.zmq_poll(awaited, _LOOK_MS)
                question = self._questions.recv_multipart() if self._questions.poll(0) else None
                # All events before the question: a connection has to be known here before it can say HELLO.
                for _ in range(_MAX_EVENTS):
                    if not self._monitor.poll(0):
                        break
                    self._note(parse_monitor_message(self._monitor.recv_multipart()))
                if question is not None:
                    self._questions.send_multipart(self._answer(question))
                self._disconnect_late()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        user, status = b"", b"500"
        try:
            _, _, domain, address, _, mechanism, *credentials = question
            key = z85.encode(credentials[0])
            if (domain, mechanism) == (_DOMAIN, b"CURVE") and key.decode() in self.principals.by_key:
                user, status = key, b"200"
            else:
                status = b"400"
                self._unknown = {"key": key[:8].decode(), "address": address.decode()}
        except Exception as error:  # it costs this handshake alone, and `_note` counts it
            self._bug = {"exc_info": error}
        return [b"1.0", question[1], status, b"", user, b""]

    def _note(self, event: Any) -> None:
        kind, value = event["event"], event["value"]  # the value is a descriptor, or why a handshake failed
        if kind == zmq.EVENT_ACCEPTED:
            self._accept(value)
        elif kind == zmq.EVENT_DISCONNECTED:
            with self._lock:
                self._open.pop(value, None)
                self._strangers.pop(value, None)
        elif kind in _FAILURES:
            self._failures[_REASONS.get(value, _FAILURES[kind])] += 1

    def _accept(self, descriptor: int) -> None:
        now_s = time.monotonic()
        with self._lock:
            self._accepted += 1
            self._open[descriptor] = self._accepted
            self._strangers[descriptor] = now_s + self._timeout_s
            if len(self._strangers) > MAX_STRANGERS:
                oldest, until_s = next(iter(self._strangers.items()))
                is_old = until_s - self._timeout_s < now_s - _GRACE_S
                self._disconnect(oldest if is_old else descriptor)

    def _disconnect_late(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_MS / 1000:
            return
        self._looked_s = now_s
        with self._lock:
            for descriptor in [each for each, until_s in self._strangers.items() if until_s < now_s]:
                self._disconnect(descriptor)

    def _disconnect(self, descriptor: int) -> None:
        """End a connection; ZeroMQ closes its descriptor. Never touch what has the number by now.

        Where that fails, as without a free descriptor, it is tried again.
        """
        with contextlib.suppress(OSError):
            # A duplicate, whose family is not looked at.
            with socketlib.fromfd(descriptor, socketlib.AF_UNIX, socketlib.SOCK_STREAM) as connection:
                name = connection.getsockname()
                if (name[1] if isinstance(name, tuple) else name) == self._place:
                    connection.shutdown(socketlib.SHUT_RDWR)
            del self._strangers[descriptor]
