# ruff: noqa: D102 - see `Origin`
"""Connections that have said HELLO, and the replies on their way to them."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Final

import numpy as np

from instep.core.tables import ORIGIN_OF, Tables
from instep.core.typing import I64
from instep.frontends.models import Served
from instep.frontends.zmq import encode
from instep.frontends.zmq.answers import (
    ASK_EVERY,
    LEFT,
    MOST_UNREAD,
    OBJECTS_BYTES,
    PEER_MOST_UNREAD,
    UNREAD,
    answer,
    new_header,
)
from instep.frontends.zmq.router import Sender, Sent
from instep.frontends.zmq.table import NOBODY, PeerTable
from instep.security.authenticator import Connection
from instep.security.principals import LOCAL, Principal
from instep.security.quotas import Usage
from instep.streaming.api import Refusal, Reply, StreamEvent
from instep_client.protocol.wire import Message

_MOST_SILENCES: Final = 4
"""The number of probing intervals after which a peer that answers no PING is dropped."""
_SHORT_PROBE_NS: Final = 1_000_000_000
"""The longest probing interval for peers without streams, or of a version that waits for them to leave. ZeroMQ reports
an ended connection only when something is sent to it.
"""
_LEAST_ASKED_BYTES: Final = 65_536
"""The bytes after which a peer is sent a PING, however many peers there are."""


@dataclass(slots=True, eq=False)
class Peer:
    """One connection: an `Origin`."""

    outbound: Outbound
    routing_id: bytes
    served: Served
    """Its model, from HELLO to the end of the connection; another version of it after a move."""
    principal: Principal = LOCAL
    """Who it was at HELLO, with the same rights until the end of the connection; the routing id is no identity."""
    usage: Usage = field(default_factory=partial(Usage, LOCAL))
    """That of the principal, on all of its connections."""
    connection: Connection = (-1, 0)
    """For the authenticator."""
    number: int = -1
    arrival: int = 0
    row: int = -1
    """In `PeerTable.peers`, whose fields it shows."""
    outbox: deque[tuple[Message, int]] = field(default_factory=deque)
    """Messages that ZeroMQ did not accept, each with the number of frames it answers."""
    outbox_bytes: int = 0
    blocked_since_ns: int = 0
    """The time at which the outbox last moved or the peer last acknowledged; valid only while the outbox is not empty.
    """
    last_probed_ns: int = 0
    asked: dict[int, int] = field(default_factory=dict)
    """Unanswered PINGs by number, oldest first, each with the value of `sent_bytes` at that time."""
    requests: int = 0
    """The number of its requests on streams under way."""
    is_unused: bool = True
    """Whether it had no streams after its last request on streams."""
    is_gone: bool = False
    reason: str = ""
    """Why the server ended the connection, if it did."""

    def get(self, field: str) -> int:
        """A field of its row."""
        return int(self.outbound.table.peers[field][self.row])

    def set(self, field: str, value: int) -> None:
        """Change a field of its row."""
        self.outbound.table.peers[field][self.row] = value

    def deliver(self, reply: Reply) -> None:
        self.outbound.send(self, encode.stepped(reply), reply.frames)

    def refuse(self, tag: int, refusal: Refusal) -> None:
        log = self.served.service.log
        about = {"connection": self.number, "principal": self.principal.name}
        log.debug("refused", **about, code=refusal.code.name, reason=str(refusal))
        self.outbound.send(self, encode.error(tag, refusal))

    def notify(self, event: StreamEvent) -> None:
        renewed = event.renewed
        self.outbound.send(self, encode.evicted(event) if renewed is None else encode.woken(event.handles, renewed))

    def check_quota(self, streams: int) -> None:
        self.usage.check_streams(streams)


class Outbound:
    """Sends messages without ever waiting for a peer.

    ZeroMQ counts the messages that it keeps for a peer, not their bytes, and does not tell whether the peer reads them.
    So bytes are counted here, and now and then a PING is sent, with a number that nobody can guess; the PONG that
    echoes it shows that the peer has read up to there.

    A peer may leave `max_unread_bytes` unread, and all peers together half of `max_total_bytes`; beyond the latter a
    peer gets one reply at a time. Further messages, and those that ZeroMQ has no room for, wait in the peer's outbox.
    An outbox is bounded by the peer's credit (its frames stay on the account until ZeroMQ has taken their reply) and by
    `max_outbox_bytes`. A peer is dropped when it exceeds its bound, or when for `unreachable_after_ns` its outbox has
    not moved and the peer has not said that it reads. If all outboxes need more than the other half of
    `max_total_bytes`, the peer with the largest is dropped.

    Args:
        router: the socket.
        table: what compiled code knows of the peers.
        max_unread_bytes: bytes handed to ZeroMQ for one peer that it may not have read.
        max_outbox_bytes: bytes kept for one peer besides those.
        max_total_bytes: bytes of both kinds, of all peers.
        unreachable_after_ns: how long an outbox may keep its oldest message.
        clock: nanoseconds on the monotonic clock.
        on_gone: called for a peer that was dropped.
    """

    def __init__(
        self,
        router: Sender,
        table: PeerTable,
        max_unread_bytes: int,
        max_outbox_bytes: int,
        max_total_bytes: int,
        unreachable_after_ns: int,
        clock: Callable[[], int],
        on_gone: Callable[[Peer], None],
    ) -> None:
        self._router = router
        self.table = table
        self._budget: I64 = np.zeros(4, np.int64)
        self._budget[MOST_UNREAD], self._budget[PEER_MOST_UNREAD] = max_total_bytes // 2, max_unread_bytes
        self._header, self._outcomes = new_header(), np.zeros(0, np.int64)
        self._max_outbox_bytes = max_outbox_bytes
        self.max_total_bytes = max_total_bytes
        self.unreachable_after_ns = unreachable_after_ns
        self._clock = clock
        self._on_gone = on_gone
        self._blocked: dict[Peer, None] = {}
        """Peers with an outbox, in the order in which they were blocked."""
        self._peers: dict[bytes, Peer] = {}
        self._by_row: dict[int, Peer] = {}
        self._unreachable: set[Peer] = set()
        """Peers that were disconnected when `ask_all` last asked them."""
        self._share()
        self.total_bytes = 0
        """Bytes in all outboxes."""

    @property
    def unread_bytes(self) -> int:
        """Bytes handed to ZeroMQ and not confirmed as read, over all peers."""
        return int(self._budget[UNREAD])

    @property
    def is_empty(self) -> bool:
        """Whether ZeroMQ has accepted everything."""
        return not self._blocked

    @property
    def is_read(self) -> bool:
        """Whether every peer connected at the last `ask_all` is known to have read everything given to ZeroMQ."""
        return all(peer in self._unreachable for peer in self._unread())

    def _unread(self) -> list[Peer]:
        """The peers that may not have read everything."""
        peers = self.table.peers
        is_unread = (peers["read_bytes"] < peers["sent_bytes"]) & (peers["origin"] != NOBODY)
        return [self._by_row[row] for row in np.flatnonzero(is_unread).tolist()]

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: Peer, model: int, now_ns: int) -> None:
        """Add a connection that has said HELLO; `model` is the table's number of its model."""
        counts = peer.usage.number != 0
        peer.row = self.table.add_peer(peer.routing_id, peer, model, now_ns, counts=counts)
        self._peers[peer.routing_id] = self._by_row[peer.row] = peer
        peer.usage.connections.add(peer)
        self._share()

    def _share(self) -> None:
        """Choose how often to ask peers, so that all unread bytes together stay within the common bound."""
        share = self.max_total_bytes // 4 // max(1, len(self._peers))
        self._budget[ASK_EVERY] = min(self._budget[PEER_MOST_UNREAD] // 2, max(_LEAST_ASKED_BYTES, share))

    def find(self, routing_id: bytes) -> Peer | None:
        """The peer of a connection, if it has said HELLO and still exists."""
        return self._peers.get(routing_id)

    def peers(self) -> list[Peer]:
        """All peers."""
        return list(self._peers.values())

    def answer(self, model: int, tables: Tables, groups: int, times_ns: tuple[int, int, int]) -> Sequence[int]:
        """Send replies of a model at once where that is possible; see `Transport.answer`."""
        socket = self._router.address_of_socket
        if socket is None:
            return range(groups)
        if len(self._outcomes) < len(tables.groups):
            self._outcomes = np.zeros(len(tables.groups), np.int64)
        outcomes, rows = self._outcomes[:groups], self.table.rows[model]
        arrays = tables.groups[:groups], tables.reply_messages, tables.reply_y
        peers, outputs = self.table.peers, tables.y.shape[1]
        if not answer(socket, peers, rows, model, self._budget, *arrays, outputs, *times_ns, self._header, outcomes):
            return ()
        for place in np.flatnonzero(outcomes > 0).tolist():
            self._count(self._by_row[int(rows[tables.groups[place, ORIGIN_OF]])], int(outcomes[place]))
        left: list[int] = np.flatnonzero(outcomes == LEFT).tolist()
        return left

    def send(self, peer: Peer, message: Message, frames: int = 0) -> None:
        """Send to a peer unless it is gone; `frames` count as its backlog until ZeroMQ accepts the message."""
        if peer.is_gone:
            return
        sent = Sent.FULL if peer.outbox else self._hand_over(peer, message)
        if sent is Sent.GONE:
            self.drop(peer)
        elif sent is Sent.FULL:
            self._keep(peer, message, frames)
        else:
            peer.set("waits", 0)

    def send_unknown(self, routing_id: bytes, message: Message) -> None:
        """Send to a connection without HELLO, if it can be sent now; nothing is queued."""
        self._router.send(routing_id, message)

    def _keep(self, peer: Peer, message: Message, frames: int) -> None:
        if not peer.outbox:
            peer.blocked_since_ns = self._clock()
            peer.set("waits", 1)
            self._blocked[peer] = None
        # The arrays of a reply are used again once it was delivered.
        peer.outbox.append(([bytes(part) for part in message], frames))
        self._grow(peer, size_bytes(message), frames)
        if peer.outbox_bytes > self._max_outbox_bytes:
            self.drop(peer)
        while self.total_bytes > self.max_total_bytes // 2:
            self.drop(max(self._blocked, key=attrgetter("outbox_bytes")))

    def _grow(self, peer: Peer, size: int, frames: int) -> None:
        """Change the counted bytes and frames of a peer's outbox."""
        peer.outbox_bytes += size
        peer.usage.kept_bytes += size
        self.total_bytes += size
        peer.served.service.engine.origins.add_backlog(peer, frames)

    def _hand_over(self, peer: Peer, message: Message) -> Sent:
        size, unread = size_bytes(message), peer.get("sent_bytes") - peer.get("read_bytes")
        is_over = self._budget[UNREAD] + size > self._budget[MOST_UNREAD] and unread > 0
        if is_over or unread > self._budget[PEER_MOST_UNREAD]:
            self.ask(peer)  # if it has read more by now, that makes room for all
            return Sent.FULL
        sent = self._router.send(peer.routing_id, message)
        if sent is Sent.HANDED_OVER:
            peer.set("sent_bytes", peer.get("sent_bytes") + size)
            self._budget[UNREAD] += size
            self._count(peer, size)
        return sent

    def _count(self, peer: Peer, size: int) -> None:
        """Add bytes that a peer was sent to its principal's usage, and ask whether it reads if that is due."""
        peer.usage.kept_bytes += size
        unasked = peer.get("sent_bytes") - peer.get("asked_bytes")
        if unasked > self._budget[ASK_EVERY] or (peer.usage.number and unasked > peer.usage.share_bytes):
            self._ask(peer)

    def ask(self, peer: Peer) -> None:
        """Ask a peer how much it has read, unless it has been sent nothing since it was asked."""
        if peer.get("asked_bytes") < peer.get("sent_bytes"):
            self._ask(peer)

    def _ask(self, peer: Peer) -> Sent:
        sent_bytes = peer.get("sent_bytes")
        is_asked = peer.asked and peer.get("asked_bytes") == sent_bytes
        number = next(reversed(peer.asked)) if is_asked else secrets.randbits(62)
        sent = self._router.send(peer.routing_id, encode.ping(number))
        if sent is Sent.HANDED_OVER:
            peer.asked[number] = sent_bytes
            peer.set("asked_bytes", sent_bytes)
        return sent

    def ask_all(self) -> None:
        """Send PING to every connected peer that may have unread messages."""
        self._unreachable = {peer for peer in self._unread() if self._ask(peer) is Sent.GONE}

    def acknowledge(self, peer: Peer, number: int) -> None:
        """Note that a peer echoed the PING of this number, and has therefore read everything before it."""
        sent_bytes = peer.asked.get(number, 0)
        newly_read = sent_bytes - peer.get("read_bytes")
        if newly_read > 0:
            peer.asked = {other: bytes_then for other, bytes_then in peer.asked.items() if bytes_then > sent_bytes}
            self._budget[UNREAD] -= newly_read
            peer.usage.kept_bytes -= newly_read
            peer.set("read_bytes", sent_bytes)
            if peer.outbox:
                peer.blocked_since_ns = self._clock()
                self._flush(peer, peer.blocked_since_ns)

    def tick(self, now_ns: int, probe_after_ns: int) -> None:
        """Retry blocked peers, drop those that accept nothing or never answer, and probe silent ones."""
        for peer in list(self._blocked):
            self._flush(peer, now_ns)
        for peer in self.peers():
            silent_ns = now_ns - max(peer.get("last_heard_ns"), peer.last_probed_ns)
            may_leave = peer.is_unused or peer.served.service.is_former
            longest_ns = min(probe_after_ns, _SHORT_PROBE_NS) if may_leave else probe_after_ns
            until_ns = peer.get("last_heard_ns") + _MOST_SILENCES * probe_after_ns
            if now_ns > until_ns and (peer.outbox or peer.last_probed_ns > peer.get("last_heard_ns")):
                # Where the server itself was stopped meanwhile, it may have asked only now.
                if peer.last_probed_ns <= until_ns or silent_ns > longest_ns:
                    self.drop(peer)  # stopped, or behind a cable that was pulled
            elif silent_ns > longest_ns and not peer.outbox:
                peer.last_probed_ns = now_ns
                if self._ask(peer) is Sent.GONE:
                    self.drop(peer)

    def _flush(self, peer: Peer, now_ns: int) -> None:
        while peer.outbox:
            message, frames = peer.outbox[0]
            sent = self._hand_over(peer, message)
            if sent is Sent.FULL and now_ns - peer.blocked_since_ns <= self.unreachable_after_ns:
                return
            if sent is not Sent.HANDED_OVER:
                self.drop(peer)
                return
            peer.outbox.popleft()
            self._grow(peer, -size_bytes(message), -frames)
            peer.blocked_since_ns = now_ns
        peer.set("waits", 0)
        self._blocked.pop(peer, None)

    def say_last(self, message: Message, peers: Iterable[Peer]) -> None:
        """Hand all waiting messages and this one to ZeroMQ, without any bound because no message follows."""
        for peer in peers:
            last = [*(kept for kept, _ in peer.outbox), message]
            peer.outbox.clear()
            for each in last:
                if self._router.send(peer.routing_id, each) is not Sent.HANDED_OVER:
                    break

    def drop(self, peer: Peer) -> None:
        """Forget a connection, unless that was done before; `on_gone` takes care of its streams."""
        if peer.is_gone:
            return
        peer.is_gone = True
        peer.usage.connections.remove(peer)
        unread_bytes = peer.get("sent_bytes") - peer.get("read_bytes")
        peer.usage.kept_bytes -= peer.outbox_bytes + unread_bytes
        self.total_bytes -= peer.outbox_bytes
        self._budget[UNREAD] -= unread_bytes
        del self._peers[peer.routing_id], self._by_row[peer.row]
        self.table.remove_peer(peer.row)
        self._share()
        self._blocked.pop(peer, None)
        peer.outbox.clear()
        self._on_gone(peer)


def size_bytes(message: Message) -> int:
    """The approximate memory of a message, including the objects around its parts."""
    return OBJECTS_BYTES + sum(map(len, message))
