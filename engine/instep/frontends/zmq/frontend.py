# ruff: noqa: D102 - see `Frontend`
"""The front end: receives messages, submits frames, begins requests, and finds dead peers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import numpy as np
import structlog

from instep.frontends.zmq import encode
from instep.frontends.zmq.decode import Decoder
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import Router
from instep.streaming.api import Grants, Refusal
from instep.streaming.engine import Engine
from instep.streaming.listing import Listing
from instep.streaming.operations import StreamOperations
from instep.streaming.reaper import Reaper
from instep.streaming.tasks import Tasks
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.step_messages import request_of_step
from instep_client.protocol.wire import Code, Header, Kind, Message, ServerInfo

_BURST: Final = 256
_STEP: Final = bytes([Kind.STEP])
_MOST_REQUESTS: Final = 512
"""Requests on streams that may be under way, of all peers together. A peer may have as many as places are left to the
others: 256 when it is the only one, a third each when there are two. So there is always a place for one more peer."""
_BUSY_RETRY_US: Final = 2000

Handler: TypeAlias = Callable[[Peer, Header, list[bytes]], Awaitable[Message]]


class ZmqFrontend:
    """The ROUTER socket's side of the engine.

    A peer that was not heard of for `probe_after_ns` is asked whether it still exists. `wake` lets the loop take a
    turn, because a send outside of one may have taken the signal of an arrival. The front end closes the router.
    """

    def __init__(
        self,
        router: Router,
        engine: Engine,
        operations: StreamOperations,
        reaper: Reaper,
        tasks: Tasks,
        outbound: Outbound,
        decoder: Decoder,
        info: ServerInfo,
        probe_after_ns: int,
        wake: Callable[[], None],
        listing: Listing,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.router = router
        self.listing = listing
        self._log = log
        self.outbound = outbound
        self._engine = engine
        self._operations = operations
        self._reaper = reaper
        self._tasks = tasks
        self._decoder = decoder
        self.info = info
        self._probe_after_ns = probe_after_ns
        self._wake = wake
        self._requests = 0
        self._draining = False
        self._takes_frames = True
        self._handlers: dict[Kind, Handler] = {
            Kind.OPEN: self._open,
            Kind.RESUME: self._resume,
            Kind.READ_STATE: self._read_state,
            Kind.RESET: self._reset,
            Kind.FORK: self._fork,
            Kind.CLOSE: self._close,
        }

    # ── As the loop sees it ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def signal_fd(self) -> int:
        return self.router.signal_fd

    @property
    def is_readable(self) -> bool:
        return self.router.is_readable

    @property
    def is_idle(self) -> bool:
        return self.outbound.is_empty and not self._requests

    def receive(self, budget_ns: int) -> bool:
        deadline_ns, frames = 0, None
        self._takes_frames = self._is_ready  # nothing changes it while messages are taken
        for routing_id, frames in self.router.receive(_BURST):
            now_ns = time.monotonic_ns()
            deadline_ns = deadline_ns or now_ns + budget_ns
            if self._take(routing_id, frames, now_ns) or now_ns > deadline_ns:
                break
        return frames is not None

    def tick(self, now_ns: int) -> None:
        self.outbound.tick(now_ns, self._probe_after_ns)

    def drain(self) -> None:
        """Take nothing new from now on."""
        self._draining = True

    def go_away(self, reason: str) -> None:
        self.outbound.say_last(encode.goodbye(reason))

    def close(self) -> None:
        self.router.close()

    # ── Messages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, routing_id: bytes, frames: list[bytes], now_ns: int) -> bool:
        """Take one message. Errors in it are answered with a message and never raised.

        Returns:
            Whether a request on streams was begun, so that the loop has to take a turn before the next message.
        """
        peer = self.outbound.find(routing_id)
        if frames[0][:1] == _STEP:
            self._take_step(routing_id, peer, frames, now_ns)
            return False
        request = 0
        if peer is None and frames == [b""]:  # ZMQ_PROBE_ROUTER: every client's connection begins with it
            self.outbound.send_unknown(routing_id, encode.error(0, Refusal(Code.HELLO_FIRST)))
            return False
        try:
            kind, request, _ = header = wire.unpack_header(frames)
            if peer is None:
                self._welcome(routing_id, header, now_ns)
                return False
            peer.last_heard_ns = now_ns
            if (handler := self._handlers.get(kind)) is not None:
                return self._begin(handler, peer, header, frames)
            self._reply_at_once(peer, header, frames, now_ns)
        except MalformedMessage as error:
            self._refuse(routing_id, peer, request, Refusal(Code.MALFORMED, str(error)))
        except RecursionError:  # a value nested a thousand deep cannot even be shown in a sentence
            self._refuse(routing_id, peer, request, Refusal(Code.MALFORMED, "the header is nested too deep"))
        except Refusal as refusal:
            self._refuse(routing_id, peer, request, refusal)
        return False

    def _take_step(self, routing_id: bytes, peer: Peer | None, frames: list[bytes], now_ns: int) -> None:
        try:
            if peer is None:
                raise Refusal(Code.HELLO_FIRST)
            peer.last_heard_ns = now_ns
            if not self._takes_frames:
                self._refuse_what_is_new()
            self._engine.submit(self._decoder.step(peer, frames))
        except MalformedMessage as error:
            refusal = Refusal(Code.MALFORMED, str(error))
            self._refuse(routing_id, peer, request_of_step(frames[0]), refusal)
        except Refusal as refusal:
            self._refuse(routing_id, peer, request_of_step(frames[0]), refusal)

    def _welcome(self, routing_id: bytes, header: Header, now_ns: int) -> None:
        if header.kind is not Kind.HELLO:
            raise Refusal(Code.HELLO_FIRST)
        self._decoder.hello(header, routing_id)
        self._refuse_what_is_new()
        peer = Peer(self.outbound, routing_id, now_ns)
        if not self._engine.origins.connect(peer):
            count = len(self._engine.origins)
            sentence = f"the server has {count} connections, as many as limits.max_connections allows; try again later"
            raise Refusal(Code.BUSY, retry_after_us=1_000_000, sentence=sentence)
        self.outbound.add(peer)
        self._log.debug("connected", connection=peer.number, name=header.fields[1])
        self.outbound.send(peer, encode.welcome(header.request, self.info))

    def _reply_at_once(self, peer: Peer, header: Header, frames: list[bytes], now_ns: int) -> None:
        match header.kind:
            case Kind.HELLO:
                self._decoder.hello(header, peer.routing_id)
                self.outbound.send(peer, encode.welcome(header.request, self.info))
            case Kind.PING:
                self.outbound.send(peer, encode.pong(header.request))
            case Kind.PONG:
                self.outbound.acknowledge(peer, header.request)
            case Kind.LIST:
                page = self.listing.page(*self._decoder.listing(header, frames[1]), now_ns)
                self.outbound.send(peer, encode.listed(header.request, page))
            case Kind.STATS:
                self.outbound.send(peer, encode.statistics(header.request, self.statistics()))
            case _:
                raise MalformedMessage(f"{header.kind.name} is a message of the server's")

    def _refuse(self, routing_id: bytes, peer: Peer | None, request: int, refusal: Refusal) -> None:
        if peer is not None:
            peer.refuse(request, refusal)
        else:
            self.outbound.refused_total += 1
            self.outbound.send_unknown(routing_id, encode.error(request, refusal))

    @property
    def _is_ready(self) -> bool:
        return not (self._draining or self._engine.journal.has_failed)

    def _refuse_what_is_new(self) -> None:
        if not self._is_ready:
            has_failed = self._engine.journal.has_failed
            raise Refusal(Code.SHUTTING_DOWN, "its recording has failed" if has_failed else "")

    def statistics(self) -> dict[str, float]:
        """The server's numbers by name, as STATISTICS holds them."""
        engine, table = self._engine, self._engine.table
        return {
            "ready": float(self._is_ready),
            **engine.stats.values(),
            "refused_messages_total": float(self.outbound.refused_total),
            "connections": float(len(engine.origins)),
            "streams_open": float(table.open_count),
            "streams_parked": float(table.owned[table.parked]),
            "streams_hibernated": float(self.listing.hibernating_count),
            "frames_pending": float(engine.pending_frames),
        }

    # ── Requests on streams ────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, handler: Handler, peer: Peer, header: Header, frames: list[bytes]) -> bool:
        if peer.requests >= _MOST_REQUESTS - self._requests:
            raise Refusal(Code.BUSY, "too many requests on streams are under way", _BUSY_RETRY_US)
        self._requests += 1
        peer.requests += 1
        self._tasks.start(self._run(handler, peer, header, frames))
        return True

    async def _run(self, handler: Handler, peer: Peer, header: Header, frames: list[bytes]) -> None:
        about = {"request": header.kind.name, "connection": peer.number}
        try:
            self.outbound.send(peer, await handler(peer, header, frames))
            self._log.debug("request", **about, streams=header.fields[0])
        except (MalformedMessage, Refusal) as error:
            refusal = error if isinstance(error, Refusal) else Refusal(Code.MALFORMED, str(error))
            peer.refuse(header.request, refusal)
            self._log.debug("refused", **about, code=refusal.code.name, reason=str(refusal))
        finally:
            self._requests -= 1
            peer.requests -= 1
            self._wake()

    async def _open(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        decoder = self._decoder
        count = decoder.count(header.fields[0])
        names = wire.unpack_names(frames[1], count)
        states = decoder.states(header.fields[1], frames[2], count)
        first_seqs = decoder.first_seqs(header.fields[2], frames[3], count)
        self._refuse_what_is_new()
        codes = decoder.name_codes(names)
        codes[codes == 0] = decoder.state_codes(states, count)[codes == 0]
        good = np.flatnonzero(codes == 0)
        opened = await self._operations.open(
            peer,
            [names[index] for index in good.tolist()],
            None if states is None else states[good],
            None if first_seqs is None else first_seqs[good],
        )
        return encode.granted(Kind.OPENED, header.request, opened.spread(codes), self.info.durability)

    async def _resume(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        count = self._decoder.count(header.fields[0])
        take_over = wire.count_field(header.fields[1], "take_over", 1, at_least=0)
        names = wire.unpack_names(frames[1], count)
        claims = wire.array_frame(frames[2], wire.CLAIM, (count,), "claims")
        self._refuse_what_is_new()
        resumed = await self._operations.resume(peer, names, claims["have"], claims["epoch"], bool(take_over))
        return encode.granted(Kind.RESUMED, header.request, resumed, self.info.durability)

    async def _read_state(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        count = self._decoder.count_with_states(header.fields[0])
        if wire.count_field(header.fields[1], "by_name", 1, at_least=0):
            read = await self._operations.read_states(wire.unpack_names(frames[1], count))
        else:
            read = await self._operations.read_own_states(peer, self._decoder.handles(frames[1], count))
        return encode.state_read(header.request, read)

    async def _reset(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        count = self._decoder.count(header.fields[0])
        states = self._decoder.states(header.fields[1], frames[2], count)
        handles = self._decoder.handles(frames[1], count)
        self._refuse_what_is_new()
        codes = self._decoder.state_codes(states, count)
        return encode.changed(header.request, await self._operations.write_states(peer, handles, states, codes))

    async def _fork(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        count = self._decoder.count_with_states(header.fields[0])
        names = wire.unpack_names(frames[2], count)
        handles = self._decoder.handles(frames[1], count)
        self._refuse_what_is_new()
        forked: Grants = await self._operations.fork(peer, handles, names, self._decoder.name_codes(names))
        return encode.granted(Kind.OPENED, header.request, forked, self.info.durability)

    async def _close(self, peer: Peer, header: Header, frames: list[bytes]) -> Message:
        count = self._decoder.count_with_states(header.fields[0])
        closings = wire.array_frame(frames[1], wire.CLOSING, (count,), "closings")
        states, codes = await self._operations.close(peer, closings["handle"], closings["have"])
        return encode.closed(header.request, states, codes)
