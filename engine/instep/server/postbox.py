"""Delivery to connections: send at once, keep what does not fit, give up on who is gone or never reads."""

from __future__ import annotations

from collections.abc import Callable

from instep.server import replies
from instep.server.clients import Client, ClientTable
from instep.server.transport import Sender, Sent
from instep_client.protocol.wire import Message


class Postbox:
    """Sends replies without ever waiting for a peer.

    ZeroMQ counts the messages it keeps for a peer, not their bytes, and does not tell whether the peer reads them. So
    the postbox counts bytes, and asks: a PING goes out with every half of `max_unread_bytes`, numbered by the bytes
    sent so far, and the PONG that echoes it says that the connection has read up to there.

    A message beyond `max_unread_bytes`, or one that ZeroMQ has no room for, is kept in the connection's outbox, in
    order. What an outbox may hold is bounded by the connection's credit (frames stay on its account until ZeroMQ has
    taken their answer) and by `max_outbox_bytes`; a connection that goes beyond, or whose outbox has not moved for
    `unreachable_after_ns`, is given up.

    Args:
        router: the socket.
        clients: the connections.
        max_unread_bytes: bytes handed to ZeroMQ for one connection that it may not have read.
        max_outbox_bytes: bytes kept for one connection beside those.
        unreachable_after_ns: how long an outbox may stand still.
        probe_after_ns: a connection not heard of for this long is sent a PING, to learn whether it still exists.
        on_gone: called for a connection that was given up, after it is forgotten.
    """

    def __init__(
        self,
        router: Sender,
        clients: ClientTable,
        max_unread_bytes: int,
        max_outbox_bytes: int,
        unreachable_after_ns: int,
        probe_after_ns: int,
        on_gone: Callable[[Client], None],
    ) -> None:
        self._router = router
        self._clients = clients
        self._max_unread_bytes = max_unread_bytes
        self._max_outbox_bytes = max_outbox_bytes
        self._unreachable_after_ns = unreachable_after_ns
        self._probe_after_ns = probe_after_ns
        self._on_gone = on_gone
        self._stuck: set[int] = set()

    @property
    def is_empty(self) -> bool:
        """Whether ZeroMQ has taken everything."""
        return not self._stuck

    def send(self, client: Client, message: Message, now_ns: int, frames: int = 0) -> None:
        """Send to a connection; `frames` leave its account once ZeroMQ has taken the message.

        A connection that was given up is sent nothing.
        """
        if self._clients.by_number(client.number) is not client:
            return
        sent = Sent.FULL if client.outbox else self._hand_over(client, message)
        if sent is Sent.HANDED_OVER:
            client.frames_unanswered -= frames
        elif sent is Sent.GONE:
            self.give_up(client)
        else:
            if not client.outbox:
                client.stuck_since_ns = now_ns
                self._stuck.add(client.number)
            client.outbox.append((message, frames))
            client.outbox_bytes += replies.size_bytes(message)
            if client.outbox_bytes > self._max_outbox_bytes:
                self.give_up(client)

    def _hand_over(self, client: Client, message: Message) -> Sent:
        if client.sent_bytes - client.read_bytes > self._max_unread_bytes:
            if client.asked_bytes <= client.read_bytes:  # there was no room for the question when it was due
                self._ask(client)
            return Sent.FULL
        sent = self._router.send(client.routing_id, message)
        if sent is Sent.HANDED_OVER:
            client.sent_bytes += replies.size_bytes(message)
            if client.sent_bytes - client.asked_bytes > self._max_unread_bytes // 2:
                self._ask(client)
        return sent

    def _ask(self, client: Client) -> None:
        if self._router.send(client.routing_id, replies.ping(client.sent_bytes)) is Sent.HANDED_OVER:
            client.asked_bytes = client.sent_bytes

    def has_read(self, client: Client, sent_bytes: int, now_ns: int) -> None:
        """A connection echoed a PING: it has read everything up to there."""
        if client.read_bytes < sent_bytes <= client.asked_bytes:
            client.read_bytes = sent_bytes
            if client.outbox:
                self._flush_one(client, now_ns)

    def send_unknown(self, routing_id: bytes, message: Message) -> None:
        """Send to a connection that never said HELLO, if it listens; nothing is kept for it."""
        self._router.send(routing_id, message)

    def flush(self, now_ns: int) -> None:
        """Try the outboxes again; give up connections whose outbox has stood still for too long."""
        for number in list(self._stuck):
            client = self._clients.by_number(number)
            if client is None:
                self._stuck.discard(number)
                continue
            self._flush_one(client, now_ns)

    def _flush_one(self, client: Client, now_ns: int) -> None:
        while client.outbox:
            message, frames = client.outbox[0]
            sent = self._hand_over(client, message)
            if sent is Sent.FULL and now_ns - client.stuck_since_ns <= self._unreachable_after_ns:
                return
            if sent is not Sent.HANDED_OVER:
                self.give_up(client)
                return
            client.outbox.popleft()
            client.outbox_bytes -= replies.size_bytes(message)
            client.frames_unanswered -= frames
            client.stuck_since_ns = now_ns
        self._stuck.discard(client.number)

    def probe(self, now_ns: int) -> None:
        """Ask after connections that have been silent; those that no longer exist are given up."""
        for client in self._clients.all():
            silent_since = max(client.last_heard_ns, client.last_probed_ns)
            if now_ns - silent_since > self._probe_after_ns and not client.outbox:
                client.last_probed_ns = now_ns
                self.send(client, replies.ping(client.sent_bytes), now_ns)

    def broadcast(self, message: Message, now_ns: int) -> None:
        """Send to every connection."""
        for client in self._clients.all():
            self.send(client, message, now_ns)

    def give_up(self, client: Client) -> None:
        """Forget a connection; `on_gone` takes care of its streams."""
        self._clients.forget(client)
        self._stuck.discard(client.number)
        self._on_gone(client)
