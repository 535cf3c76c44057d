# ruff: noqa: D102 - see `Frontend`
"""The front end: receives messages, submits frames, begins requests, and finds dead peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Final

import numpy as np
import structlog

from instep.frontends.zmq import encode
from instep.frontends.zmq.decode import hello
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import Router
from instep.frontends.zmq.served import HANDLERS, Handler, Served
from instep.streaming.api import Refusal
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.step_messages import request_of_step
from instep_client.protocol.wire import Code, Header, Kind

_BURST: Final = 256
_STEP: Final = bytes([Kind.STEP])
_MOST_REQUESTS: Final = 512
"""Requests on streams that may be under way, of all peers together. A peer may have as many as places are left to the
others: 256 when it is the only one, a third each when there are two. So there is always a place for one more peer."""
_BUSY_RETRY_US: Final = 2000


class ZmqFrontend:
    """The ROUTER socket's side of the engines.

    A peer that was not heard of for `probe_after_ns` is asked whether it still exists. `wake` lets the loop take a
    turn, because a send outside of one may have taken the signal of an arrival. The front end closes the router.
    """

    def __init__(
        self,
        router: Router,
        outbound: Outbound,
        max_connections: int,
        probe_after_ns: int,
        wake: Callable[[], None],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.router = router
        self.outbound = outbound
        self.models: dict[str, Served] = {}
        """By name. Connections that name none get the first one."""
        self.is_paused = False
        """While True, messages wait in ZeroMQ: streams are being moved."""
        self._max_connections = max_connections
        self._probe_after_ns = probe_after_ns
        self._wake = wake
        self._log = log
        self._requests = 0
        self._all_are_ready = True
        """Whether every model takes frames; looked up once for all messages that are received together."""

    def add(self, served: Served) -> None:
        """Welcome connections to a model from now on."""
        self.models[served.service.name] = served

    def remove(self, served: Served, reason: str) -> None:
        """Welcome no connections to a model, and end those that there are."""
        del self.models[served.service.name]
        self.outbound.say_last(encode.goodbye(reason), served)
        for peer in self.outbound.peers():
            if peer.served is served:
                self.outbound.drop(peer)

    def replace(self, former: Served, served: Served, kept_as: str) -> None:
        """Welcome connections to another version of a model.

        The connections of the former one stay with it, if it is `kept_as` another name. Otherwise they get the new one,
        with their streams.
        """
        self.models[served.service.name] = served
        if kept_as:
            former.keep_as(kept_as)
            self.models[kept_as] = former
            return
        served.info = replace(served.info, boot_id=former.info.boot_id)  # their streams are still there
        engine = served.service.engine
        owners = engine.origins.owners(engine.table, engine.table.open_slots())
        handles = {owner.number: handles for owner, handles in owners}
        for peer in self.outbound.peers():
            if peer.served is former:
                peer.served = served
                own = handles.get(peer.number, np.zeros(0, np.uint64))
                next_seqs = engine.table.next_seq[engine.table.slots.slots_named(own)]
                self.outbound.send(peer, encode.welcome(0, served.info))
                self.outbound.send(peer, encode.moved(own, next_seqs, served.info.fingerprint))

    # ── As the loop sees it ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def signal_fd(self) -> int:
        return self.router.signal_fd

    @property
    def is_readable(self) -> bool:
        return not self.is_paused and self.router.is_readable

    def receive(self, budget_ns: int) -> bool:
        if self.is_paused:
            return False
        deadline_ns, parts = 0, None
        self._all_are_ready = all(served.service.is_ready for served in self.models.values())
        for routing_id, parts in self.router.receive(_BURST):
            now_ns = time.monotonic_ns()
            deadline_ns = deadline_ns or now_ns + budget_ns
            if self._take(routing_id, parts, now_ns) or now_ns > deadline_ns:
                break
        return parts is not None

    # ── As the server sees it ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_idle(self) -> bool:
        """Whether everything that was delivered is on its way, and no request waits."""
        return self.outbound.is_empty and not self._requests

    def tick(self, now_ns: int) -> None:
        """Do what is due now and then: retry blocked replies, find dead peers."""
        self.outbound.tick(now_ns, self._probe_after_ns)

    def go_away(self, reason: str) -> None:
        """Tell every peer that the server ends."""
        self.outbound.say_last(encode.goodbye(reason))

    def close(self) -> None:
        """Close the socket."""
        self.router.close()

    # ── Messages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, routing_id: bytes, parts: list[bytes], now_ns: int) -> bool:
        """Take one message. Errors in it are answered with a message and never raised.

        Returns:
            Whether a request on streams was begun, so that the loop has to take a turn before the next message.
        """
        peer = self.outbound.find(routing_id)
        if parts[0][:1] == _STEP:
            self._take_step(routing_id, peer, parts, now_ns)
            return False
        request = 0
        if peer is None and parts == [b""]:  # ZMQ_PROBE_ROUTER: every client's connection begins with it
            self.outbound.send_unknown(routing_id, encode.error(0, Refusal(Code.HELLO_FIRST)))
            return False
        try:
            kind, request, _ = header = wire.unpack_header(parts)
            if peer is None:
                self._welcome(routing_id, header, now_ns)
                return False
            peer.last_heard_ns = now_ns
            if (handler := HANDLERS.get(kind)) is not None:
                return self._begin(handler, peer, header, parts)
            self._reply_at_once(peer, header, parts, now_ns)
        except (MalformedMessage, Refusal) as error:
            self._refuse(routing_id, peer, request, error)
        except RecursionError:  # a value nested a thousand deep cannot even be shown in a sentence
            self._refuse(routing_id, peer, request, MalformedMessage("the header is nested too deep"))
        return False

    def _take_step(self, routing_id: bytes, peer: Peer | None, parts: list[bytes], now_ns: int) -> None:
        try:
            if peer is None:
                raise Refusal(Code.HELLO_FIRST)
            peer.last_heard_ns = now_ns
            served = peer.served
            if not self._all_are_ready:
                served.refuse_what_is_new()
            served.service.engine.submit(served.decoder.step(peer, parts, now_ns))
        except (MalformedMessage, Refusal) as error:
            self._refuse(routing_id, peer, request_of_step(parts[0]), error)

    def _welcome(self, routing_id: bytes, header: Header, now_ns: int) -> None:
        if header.kind is Kind.PING:  # asks whether the server knows the connection, as after a HELLO that was refused
            self.outbound.send_unknown(routing_id, encode.error(header.request, Refusal(Code.HELLO_FIRST)))
            return
        if header.kind is not Kind.HELLO:
            raise Refusal(Code.HELLO_FIRST)
        name, model = hello(header, routing_id)
        served = self._find(model) if model else next(iter(self.models.values()))
        served.refuse_what_is_new()
        peer = Peer(self.outbound, routing_id, served, now_ns)
        count = len(self.outbound)
        if count >= self._max_connections or not served.service.engine.origins.connect(peer):
            sentence = f"the server has {count} connections, as many as limits.max_connections allows; try again later"
            raise Refusal(Code.BUSY, retry_after_us=1_000_000, sentence=sentence)
        self.outbound.add(peer)
        self._log.debug("connected", connection=peer.number, name=name)
        self.outbound.send(peer, encode.welcome(header.request, served.info))

    def _find(self, model: str) -> Served:
        """The model of that name."""
        if model not in self.models:
            close = get_close_matches(model, self.models, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise Refusal(Code.UNKNOWN_MODEL, f"{model!r:.120}; {meant}it serves {', '.join(map(repr, self.models))}")
        return self.models[model]

    def _reply_at_once(self, peer: Peer, header: Header, parts: list[bytes], now_ns: int) -> None:
        served = peer.served
        match header.kind:
            case Kind.HELLO:
                _, model = hello(header, peer.routing_id)
                if model not in ("", served.service.name):
                    raise MalformedMessage(
                        f"this connection belongs to the model {served.service.name!r}; make another one for "
                        f"{model!r:.120}"
                    )
                self.outbound.send(peer, encode.welcome(header.request, served.info))
            case Kind.PING:
                self.outbound.send(peer, encode.pong(header.request))
            case Kind.PONG:
                self.outbound.acknowledge(peer, header.request)
            case Kind.LIST:
                page = served.service.listing.page(*served.decoder.listing(header, parts[1]), now_ns)
                self.outbound.send(peer, encode.listed(header.request, page))
            case Kind.STATS:
                self.outbound.send(peer, encode.statistics(header.request, served.service.numbers()))
            case Kind.MODELS:
                models = {name: each.summary() for name, each in self.models.items()}
                self.outbound.send(peer, encode.served(header.request, models))
            case _:
                raise MalformedMessage(f"{header.kind.name} is a message of the server's")

    def _refuse(self, routing_id: bytes, peer: Peer | None, request: int, error: MalformedMessage | Refusal) -> None:
        """Refuse a message as a whole; of connections that belong to no model yet, the first one counts it."""
        refusal = error if isinstance(error, Refusal) else Refusal(Code.MALFORMED, str(error))
        served = peer.served if peer is not None else next(iter(self.models.values()))
        served.service.engine.stats.refuse(refusal.code)
        if peer is not None:
            peer.refuse(request, refusal)
        else:
            served.service.log.debug("refused", code=refusal.code.name, reason=str(refusal))
            self.outbound.send_unknown(routing_id, encode.error(request, refusal))

    # ── Requests on streams ────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, handler: Handler, peer: Peer, header: Header, parts: list[bytes]) -> bool:
        if peer.requests >= _MOST_REQUESTS - self._requests:
            raise Refusal(Code.BUSY, "too many requests on streams are under way", _BUSY_RETRY_US)
        self._requests += 1
        peer.requests += 1
        peer.served.service.tasks.start(self._run(handler, peer, header, parts), partial(self._request_ended, peer))
        return True

    async def _run(self, handler: Handler, peer: Peer, header: Header, parts: list[bytes]) -> None:
        served = peer.served
        try:
            codes, message = await handler(served, peer, header, parts)
            served.service.engine.stats.refuse_streams(codes)
            self.outbound.send(peer, message)
            about = {"request": header.kind.name, "connection": peer.number}
            self._log.debug("request", **about, streams=header.fields[0])
        except (MalformedMessage, Refusal) as error:
            self._refuse(peer.routing_id, peer, header.request, error)

    def _request_ended(self, peer: Peer) -> None:
        self._requests -= 1
        peer.is_unused = peer.is_gone or not peer.served.service.engine.origins.has_streams(peer)
        peer.requests -= 1
        self._wake()
