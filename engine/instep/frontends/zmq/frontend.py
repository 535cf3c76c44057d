# ruff: noqa: D102 - see `Frontend`
"""The front end: receives messages, submits frames, starts requests, and finds dead peers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import structlog

from instep.frontends.models import Models, Served
from instep.frontends.shards import for_table
from instep.frontends.zmq import encode
from instep.frontends.zmq.decode import Decoder, hello
from instep.frontends.zmq.inbox import Inbox
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.requests import HANDLERS, Answer, Requests
from instep.frontends.zmq.router import Router
from instep.security.policy import Verb, allowed, allowed_to_see
from instep.security.principals import LOCAL, Principal, Principals
from instep.security.quotas import Usages
from instep.streaming.api import Refusal
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Code, Header, Kind, Message, request_of_step

_STEP: Final = bytes([Kind.STEP])
_MOST_REQUESTS: Final = 512
"""The most requests on streams under way, over all peers. A peer may not have more of them than are still free: 256 for
a single peer, about 170 each for two. So another peer can always start one.
"""
_BUSY_RETRY_US: Final = 2000
_MOST_NAMES: Final = 100
"""Streams that one line of the log names."""


class ZmqFrontend:
    """Connects a ROUTER socket to the engines.

    A peer that has been silent for `probe_after_ns` is sent a PING. `wake` lets the loop take a turn, which is needed
    after a send outside of a turn, because it may have consumed the signal of an arrival. The front end closes the
    router.
    """

    def __init__(
        self,
        models: Models,
        router: Router,
        outbound: Outbound,
        probe_after_ns: int,
        wake: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.is_paused = False
        self._usages = Usages(lambda: sum((each.service.listing.counts() for each in models), Counter()))
        self._models = models
        self._router = router
        self._authenticator = router.authenticator
        if self._authenticator is not None:
            self._usages.reloaded(self._authenticator.principals.by_name.values())
        self._outbound = outbound
        self._table, self._inbox = outbound.table, Inbox(outbound.table)
        self._requests_of: dict[Served, Requests] = {}
        self._numbers: dict[Served, int] = {}
        """The table's numbers of models."""
        self._probe_after_ns = probe_after_ns
        self._wake = wake
        self._log = log
        self._requests = 0

    # ── Models ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def added(self, served: Served) -> None:
        info = served.info
        decoder = Decoder(info.features, info.state, info.max_block_frames, info.max_message_bytes)
        self._requests_of[served] = Requests(served, decoder, self._models.shard)
        engine = served.service.engine
        number = self._table.add_model(info.features, info.max_block_frames, len(engine.tables.origins))
        self._numbers[served] = number
        self._inbox.reserve()
        engine.answer_with(partial(self._outbound.answer, number))

    def removed(self, served: Served, reason: str) -> None:
        self._end([peer for peer in self._outbound.peers() if peer.served is served], reason)
        self._forget(served)

    def _forget(self, served: Served) -> None:
        del self._requests_of[served], self._numbers[served]

    def moved(self, former: Served, served: Served) -> None:
        engine = served.service.engine
        owners = engine.origins.owners(engine.table, engine.table.open_slots())
        handles = {owner.number: handles for owner, handles in owners}
        self._table.move(self._numbers[former], self._numbers[served])
        for peer in self._outbound.peers():
            if peer.served is former:
                peer.served = served
                own = handles.get(peer.number, np.zeros(0, np.uint64))
                next_seqs = engine.table.next_seq[engine.table.slots.slots_named(own)]
                self._outbound.send(peer, self._info(0, served))
                self._outbound.send(peer, encode.moved(own, next_seqs, served.info.fingerprint))
        self._forget(former)

    # ── Principals ─────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, principals: Principals) -> int:
        if self._authenticator is None:
            return 0
        self._authenticator.principals = principals
        self._usages.reloaded(principals.by_name.values())
        known, peers = principals.by_key, self._outbound.peers()
        ended = [peer for peer in peers if not peer.principal.has_rights_of(known.get(peer.principal.key))]
        self._end(ended, "the rights of this client's key were withdrawn or changed")
        return len(ended)

    def _end(self, peers: list[Peer], reason: str) -> None:
        self._outbound.say_last(encode.goodbye(reason), peers)
        for peer in peers:
            peer.reason = reason
            self._outbound.drop(peer)

    def _sender(self) -> Principal | None:
        """Who has sent the newest message; None if its key was withdrawn meanwhile."""
        return LOCAL if self._authenticator is None else self._authenticator.principals.by_key.get(self._router.key)

    # ── As the loop sees it ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def signal_fd(self) -> int:
        return self._router.signal_fd

    @property
    def is_readable(self) -> bool:
        return not self.is_paused and self._router.is_readable

    def receive(self, budget_ns: int) -> bool:
        if self.is_paused:
            return False
        inbox, now_ns, other = self._inbox, time.monotonic_ns(), None
        inbox.clear()
        for served, number in self._numbers.items():
            self._table.models["accepts"][number] = served.service.is_ready
        deadline_ns = now_ns + budget_ns
        while not inbox.is_full and now_ns <= deadline_ns:
            first = len(inbox)
            message = self._router.receive(inbox, now_ns)
            if self._authenticator is not None:
                self._check_quotas(first, now_ns)
            if message is None:
                break
            other = message
            if self._take(*other, now_ns):
                break
            now_ns = time.monotonic_ns()
        if len(inbox):
            for served, number in self._numbers.items():
                served.service.engine.submit(inbox.frames(number))
        return other is not None or len(inbox) > 0

    # ── As the server sees it ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def endpoint(self) -> str:
        return self._router.endpoint

    def tick(self, now_ns: int) -> None:
        self._outbound.tick(now_ns, self._probe_after_ns)
        if self._authenticator is not None:
            if not self._authenticator.is_alive:
                raise RuntimeError("the authenticator has ended, so nobody could connect")
            if failures := self._authenticator.failures():
                self._log.warning("handshakes failed", **failures)

    def drain(self, *, asks: bool) -> bool:
        if asks:
            self._outbound.ask_all()
        return self._outbound.is_empty and not self._requests and self._outbound.is_read

    def say_goodbye(self, reason: str) -> None:
        self._outbound.say_last(encode.goodbye(reason), self._outbound.peers())

    def close(self) -> None:
        self._router.close()

    # ── Messages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, routing_id: bytes, parts: list[bytes], now_ns: int) -> bool:
        """Process one message; errors in it are answered and never raised.

        Returns:
            Whether a request on streams was begun, so that the loop has to take a turn before the next message.
        """
        peer = self._outbound.find(routing_id)
        if parts[0][:1] == _STEP:
            self._refuse_step(routing_id, peer, parts)
            return False
        request = 0
        if peer is None and parts == [b""]:  # ZMQ_PROBE_ROUTER: every client's connection begins with it
            self._outbound.send_unknown(routing_id, encode.error(0, Refusal(Code.HELLO_FIRST)))
            return False
        try:
            kind, request, _ = header = wire.unpack_header(parts)
            if peer is None:
                self._welcome(routing_id, header, now_ns)
                return False
            peer.set("last_heard_ns", now_ns)
            if kind in HANDLERS:
                return self._begin(peer, header, parts)
            self._reply_at_once(peer, header, parts, now_ns)
        except RecursionError:  # a value nested a thousand deep cannot even be shown in a sentence
            self._refuse(routing_id, peer, request, MalformedMessage("the header is nested too deep"))
        except Exception as error:
            self._refuse(routing_id, peer, request, error)
        return False

    def _refuse_step(self, routing_id: bytes, peer: Peer | None, parts: list[bytes]) -> None:
        """Refuse a STEP that the inbox did not take."""
        try:
            if peer is None:
                raise Refusal(Code.HELLO_FIRST)
            peer.served.refuse_what_is_new()
            self._requests_of[peer.served].decoder.check_step(parts)
            raise AssertionError("a good STEP was not taken")
        except Exception as error:
            self._refuse(routing_id, peer, request_of_step(parts[0]), error)

    def _check_quotas(self, first: int, now_ns: int) -> None:
        """Count the frames of messages that the inbox has taken, from `first` on; refuse those over a quota."""
        taken = self._inbox.messages[first : len(self._inbox)]
        engines = {number: served.service.engine for served, number in self._numbers.items()}
        fields = (taken[name].tolist() for name in ("model", "origin", "tag"))
        frames = (taken["timesteps"] * taken["width"]).tolist()
        for place, (model, origin, tag, count) in enumerate(zip(*fields, frames, strict=True), first):
            peer = engines[model].origins[origin]
            if isinstance(peer, Peer):  # not dropped meanwhile
                try:
                    peer.usage.check_unread(self._outbound.ask)
                    peer.usage.check_frames(count, now_ns)
                except Refusal as refusal:
                    self._inbox.leave_out(place)
                    self._refuse(peer.routing_id, peer, tag, refusal)

    def _welcome(self, routing_id: bytes, header: Header, now_ns: int) -> None:
        if header.kind is Kind.PING:  # asks whether the server knows the connection, as after a HELLO that was refused
            self._outbound.send_unknown(routing_id, encode.error(header.request, Refusal(Code.HELLO_FIRST)))
            return
        if header.kind is not Kind.HELLO:
            raise Refusal(Code.HELLO_FIRST)
        name, model = hello(header, routing_id)
        if (principal := self._sender()) is None:
            raise Refusal(Code.NOT_ALLOWED, sentence="the server does not know this key any more")
        served = self._models.find(model, partial(allowed, principal, Verb.HELLO))
        served.refuse_what_is_new()
        usage = self._usages.of(principal)
        peer = Peer(self._outbound, routing_id, served, principal, usage)
        usage.check_connections()
        if self._table.is_full or not served.service.engine.origins.connect(peer):
            why = "limits.max_connections, or the limit of open files, allows"
            sentence = f"the server has {len(self._outbound)} connections, as many as {why}; try again later"
            raise Refusal(Code.BUSY, retry_after_us=1_000_000, sentence=sentence)
        self._outbound.add(peer, self._numbers[served], now_ns)
        if self._authenticator is not None:
            peer.connection = self._authenticator.welcome(self._router.descriptor)
        about = {"principal": principal.name, "address": self._router.address, "model": served.service.name}
        served.service.engine.table.principal_of[peer.number] = usage.number
        self._log.debug("connected", connection=peer.number, name=name, **about)
        self._outbound.send(peer, self._info(header.request, served))

    def _info(self, request: int, served: Served) -> Message:
        durability = self._models.shard.durability(served.info.durability)
        return encode.welcome(request, replace(served.info, durability=durability))

    def _reply_at_once(self, peer: Peer, header: Header, parts: list[bytes], now_ns: int) -> None:
        served = peer.served
        if header.kind in (Kind.LIST, Kind.STATS, Kind.MODELS, Kind.SHARDS):
            peer.usage.check_unread(self._outbound.ask)
        match header.kind:
            case Kind.HELLO:
                _, model = hello(header, peer.routing_id)
                if model not in ("", served.service.name):
                    raise MalformedMessage(
                        f"this connection belongs to the model {served.service.name!r}; make another one for "
                        f"{model!r:.120}"
                    )
                self._outbound.send(peer, self._info(header.request, served))
            case Kind.PING:
                self._outbound.send(peer, encode.pong(header.request))
            case Kind.PONG:
                self._outbound.acknowledge(peer, header.request)
            case Kind.LIST:
                cursor, most, place, prefix = self._requests_of[served].decoder.listing(header, parts[1])

                def accepts(name: str) -> bool:
                    return name.startswith(prefix) and allowed(peer.principal, Verb.LIST, name)

                page = served.service.listing.page(cursor, most, place, accepts, now_ns)
                self._outbound.send(peer, encode.listed(header.request, page))
            case Kind.STATS:
                numbers = served.service.numbers()
                for name, used in self.used(peer.principal).items():
                    numbers |= {f'principal_{key}{{principal="{name}"}}': number for key, number in used.items()}
                self._outbound.send(peer, encode.statistics(header.request, numbers))
            case Kind.MODELS:
                may_use = partial(allowed, peer.principal, Verb.HELLO)
                models = {each.service.name: each.summary() for each in self._models if may_use(each.service.name)}
                self._outbound.send(peer, encode.served(header.request, models))
            case Kind.SHARDS:
                alone = wire.ShardTable(np.zeros(1, np.uint64), (for_table(self._router.endpoint),))
                table = self._models.shard.table or alone
                self._outbound.send(peer, table.pack(header.request))
            case _:
                raise MalformedMessage(f"{header.kind.name} is a message of the server's")

    # ── Principals ─────────────────────────────────────────────────────────────────────────────────────────────────

    def used(self, asker: Principal = LOCAL) -> dict[str, dict[str, float]]:
        return self._usages.numbers(partial(allowed_to_see, asker))

    def _refuse(self, routing_id: bytes, peer: Peer | None, request: int, error: Exception) -> None:
        """Refuse a message as a whole; the default model counts it if the connection has no model yet.

        Any other exception is a bug in reading the message, and nothing has been applied yet.
        """
        refusal = error if isinstance(error, Refusal) else Refusal(Code.MALFORMED, str(error))
        if not isinstance(error, MalformedMessage | Refusal):
            self._log.error("bug in a request", exc_info=error)
            refusal = Refusal(Code.INTERNAL)
        served = peer.served if peer is not None else self._models.default
        served.service.engine.stats.refuse(refusal.code)
        if peer is not None:
            peer.refuse(request, refusal)
        else:
            sender = self._sender()
            about = {"principal": sender and sender.name, "address": self._router.address, "code": refusal.code.name}
            served.service.log.debug("refused", **about, reason=str(refusal))
            self._outbound.send_unknown(routing_id, encode.error(request, refusal))

    # ── Requests on streams ────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, peer: Peer, header: Header, parts: list[bytes]) -> bool:
        verb, handler = HANDLERS[header.kind]
        if not allowed(peer.principal, verb):
            who = f"the key {peer.principal.name} has the role {peer.principal.role}"
            raise Refusal(Code.NOT_ALLOWED, sentence=f"{who}, which may not {header.kind.name}")
        if peer.requests >= _MOST_REQUESTS - self._requests:
            raise Refusal(Code.BUSY, "too many requests on streams are under way", _BUSY_RETRY_US)
        peer.usage.check_unread(self._outbound.ask)
        answer = handler(self._requests_of[peer.served], peer, header, parts)
        self._requests += 1
        peer.requests += 1
        kept_bytes = header.fields[0] * peer.served.info.state.row_bytes
        peer.usage.kept_bytes += kept_bytes
        ended = partial(self._request_ended, peer, kept_bytes)
        named = _audited(header, parts)
        peer.served.service.tasks.start(self._run(answer, peer, header, named), ended)
        return True

    async def _run(self, answer: Answer, peer: Peer, header: Header, named: list[str] | None) -> None:
        served = peer.served
        try:
            codes, message = await answer()
            served.service.engine.stats.refuse_streams(codes)
            self._outbound.send(peer, message)
            about = {"request": header.kind.name, "connection": peer.number, "principal": peer.principal.name}
            about |= {"streams": header.fields[0], "refused": int(np.count_nonzero(codes))}
            about |= {"park": header.fields[1]} if header.kind is Kind.REMOVE else {}
            for code in np.unique(codes[codes != 0]).tolist():
                self._log.debug("refused", code=Code(code).name, **about)
            if named is None:
                self._log.debug("request", **about)
            else:
                self._log.debug("audited request", **about, names=named)
        except Refusal as refusal:
            self._refuse(peer.routing_id, peer, header.request, refusal)

    def _request_ended(self, peer: Peer, kept_bytes: int) -> None:
        self._requests -= 1
        peer.usage.kept_bytes -= kept_bytes
        peer.is_unused = peer.is_gone or not peer.served.service.engine.origins.has_streams(peer)
        peer.requests -= 1
        self._wake()


def _audited(header: Header, parts: list[bytes]) -> list[str] | None:
    """The first names of a request that is audited, empty where it has handles; None where it is not audited."""
    match header.kind:
        case Kind.RESET:
            return []
        case Kind.REMOVE | Kind.RESUME | Kind.READ_STATE if header.kind is Kind.REMOVE or header.fields[1]:
            return parts[1].decode().split("\n")[:_MOST_NAMES]  # also of a take-over, or by name
    return None
