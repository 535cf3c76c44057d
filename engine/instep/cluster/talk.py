"""Requests and answers between nodes, copies and the directory: msgpack over ZeroMQ, encrypted where there are keys.

A request is `[number, verb, *arguments]`. Its answer is `[number, true, value]`, or `[number, false, sentence]` if it
is refused. A message that nobody asked for has the number 0.
"""

from __future__ import annotations

import select
import time
from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

import msgpack
import zmq

from instep.config import TransportConfig
from instep.frontends.zmq.inbox import Inbox
from instep.frontends.zmq.router import Router
from instep.frontends.zmq.table import PeerTable
from instep.security.keys import ServerKeys
from instep.security.policy import Verb, allowed
from instep.security.principals import Principals
from instep_client.key_files import ClientKeys, read_key_pair
from instep_client.protocol.errors import InvalidInput

_AT_ONCE: Final = 256
_OPTIONS: Final = {
    zmq.LINGER: 0,
    zmq.IPV6: 1,
    zmq.IMMEDIATE: 1,  # nothing waits for a connection, to arrive when it is not true any more
    zmq.RECONNECT_IVL: 50,
    zmq.HEARTBEAT_IVL: 500,  # else a machine that is gone would be noticed by TCP, after minutes
    zmq.HEARTBEAT_TIMEOUT: 2000,
    zmq.HEARTBEAT_TTL: 10_000,
}
_KEYS: Final = (
    " before anything was answered: do the keys fit? Each node has one of its own (cluster.key_file), "
    "which the others' transport.peers_file names with the role node"
)


class NoAnswer(Exception):
    """Nothing has come within the time limit; the request may have arrived or not."""


class Rejected(Exception):
    """The request was refused; the message is the other side's sentence."""


class NodeRequest(NamedTuple):
    """What a connection asks."""

    connection: bytes
    number: int
    verb: str
    arguments: list[Any]
    principal: str
    """The name that its key proves; empty without keys."""


class Listener(Router):
    """A socket that gets requests, and answers them; for one thread.

    With keys only nodes are heard, and operators for the verbs in `for_operators`. Any other connection that sends
    something is ended, and so is one that sends what is not a request.
    """

    def __init__(
        self, transport: TransportConfig, keys: ServerKeys | None, for_operators: Collection[str] = frozenset()
    ) -> None:
        super().__init__(transport, keys)
        self._for_operators = for_operators
        self._inbox = Inbox(PeerTable(0))  # without peers no message is one of theirs
        self._arrivals = select.poll()
        self._arrivals.register(self.signal_fd, select.POLLIN)

    def requests(self, within_s: float) -> Iterator[NodeRequest]:
        """Wait for requests, and yield those that have come; none after `within_s`."""
        if not self.is_readable:
            self._arrivals.poll(round(within_s * 1000))
        for _ in range(_AT_ONCE):
            if (message := self.receive(self._inbox)) is None:
                return
            request = self._parse(*message)
            if request is not None:
                yield request
            elif self.authenticator is not None:
                self.authenticator.dismiss(self.authenticator.welcome(self.descriptor))

    def _parse(self, connection: bytes, parts: list[bytes]) -> NodeRequest | None:
        try:
            number, verb, *arguments = unpack(parts)
        except ValueError:  # those of msgpack and of UTF-8 among them
            return None
        if type(number) is not int or type(verb) is not str:
            return None
        if self.authenticator is None:
            return NodeRequest(connection, number, verb, arguments, "")
        self.authenticator.welcome(self.descriptor)
        principal = self.authenticator.principals.by_key.get(self.key)
        if principal is None:
            return None
        request = NodeRequest(connection, number, verb, arguments, principal.name)
        if not allowed(principal, Verb.MANAGE if verb in self._for_operators else Verb.TAKE_PART):
            self.refuse(request, f"{principal.name} has the role {principal.role}, which may not ask for {verb!r:.40}")
            return None
        return request

    def answer(self, request: NodeRequest, value: Any) -> None:
        """Answer a request; an answer that cannot be sent now is dropped, and will be asked for again."""
        self.send(request.connection, [msgpack.packb([request.number, True, value])])

    def refuse(self, request: NodeRequest, sentence: str) -> None:
        """Answer that it is refused."""
        self.send(request.connection, [msgpack.packb([request.number, False, sentence])])

    def tell(self, connection: bytes, value: Any) -> None:
        """Send what nobody asked for, or drop it if it cannot be sent now."""
        self.send(connection, [msgpack.packb([0, True, value])])

    def failures(self) -> dict[str, Any]:
        """See `Authenticator.failures`."""
        return {} if self.authenticator is None else self.authenticator.failures()

    def admit(self, principals: Principals) -> None:
        """Hear these from now on, where there are keys."""
        if self.authenticator is not None:
            self.authenticator.principals = principals


class Caller:
    """Asks what listens at an endpoint; for one thread.

    A connection that is lost is made again, and whoever asks learns that it was lost.

    Args:
        endpoint: `tcp://HOST:PORT` or `ipc://PATH`.
        keys: the listener's public key, and the caller's own; None without keys.
        max_bytes: the longest message that is taken.

    Raises:
        InvalidInput: it is not an endpoint.
    """

    def __init__(self, endpoint: str, keys: ClientKeys | None = None, max_bytes: int = 2**24) -> None:
        self._endpoint, self._number, self._was_answered = endpoint, 0, False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in {**_OPTIONS, zmq.MAXMSGSIZE: max_bytes}.items():
            self._socket.set(option, value)
        if keys is not None:
            encoded = (key.encode() for key in keys)
            self._socket.curve_serverkey, self._socket.curve_publickey, self._socket.curve_secretkey = encoded
        self._losses = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise InvalidInput(f"{endpoint!r} is not tcp://HOST:PORT: {error}") from None

    def send(self, verb: str, *arguments: Any, within_s: float = 0.0) -> int:
        """Send a request, and return its number.

        Raises:
            NoAnswer: there has been no connection, or no room in its queue, within this time.
        """
        self._number += 1
        if not self._is_ready(zmq.POLLOUT, within_s):
            raise NoAnswer(f"{self._endpoint} cannot be reached")
        self._socket.send(msgpack.packb([self._number, verb, *arguments]), zmq.NOBLOCK)
        return self._number

    def receive(self, within_s: float, *others: Any) -> tuple[int, Any] | None:
        """The number and value of the next answer; None if none has come within this time, or one of `others` is ready.

        Raises:
            NoAnswer: the connection is lost; requests without an answer may have arrived or not.
            Rejected: with the sentence.
        """
        if not self._is_ready(zmq.POLLIN, within_s, *others):
            return None
        number, is_granted, value = unpack(self._socket.recv_multipart())
        self._was_answered = True
        if not is_granted:
            raise Rejected(value)
        return number, value

    def _is_ready(self, event: int, within_s: float, *others: Any) -> bool:
        awaited = [(self._socket, event), *((each, zmq.POLLIN) for each in (self._losses, *others))]
        ready = [each for each, _ in zmq.zmq_poll(awaited, max(0, round(within_s * 1000)))]
        if self._socket not in ready and self._losses in ready:
            while self._losses.poll(0):
                self._losses.recv_multipart()
            hint = "" if self._was_answered else _KEYS
            raise NoAnswer(f"the connection to {self._endpoint} is lost{hint}")
        return self._socket in ready

    def ask(self, verb: str, *arguments: Any, within_s: float) -> Any:
        """Send a request, and return its answer. Late answers to earlier ones are dropped.

        Raises:
            NoAnswer: none has come within this time.
            Rejected: with the sentence; also of an earlier request whose answer was not waited for.
        """
        until_s = time.monotonic() + within_s
        number = self.send(verb, *arguments, within_s=within_s)
        while (answer := self.receive(until_s - time.monotonic())) is not None:
            if answer[0] == number:
                return answer[1]
        raise NoAnswer(f"{self._endpoint} has not answered within {within_s:g} s")

    def close(self) -> None:
        """End; the second time does nothing."""
        self._context.destroy(linger=0)


def unpack(parts: list[bytes]) -> list[Any]:
    """The list that a message of one part holds.

    Raises:
        ValueError: when it holds something else.
    """
    (body,) = parts
    message = msgpack.unpackb(body, max_ext_len=0)
    if not isinstance(message, list):
        raise ValueError("not a list")
    return message


def keys_for(transport: TransportConfig, name: str) -> ClientKeys | None:
    """The keys by which a node connects to another one, or to the directory, of this name; None without keys.

    Raises:
        InvalidInput: a file cannot be used, or nobody has that name.
    """
    if transport.key_file is None or transport.peers_file is None:
        return None
    peer = Principals.read(transport.peers_file).by_name.get(name)
    if peer is None:
        raise InvalidInput(f"transport.peers_file {transport.peers_file}: it has no {name}, whose public key is needed")
    return peer.key, *read_key_pair(transport.key_file)
