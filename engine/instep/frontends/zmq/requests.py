"""The requests on streams of one model: decodes them, has its service carry them out, and encodes replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import I32
from instep.frontends.models import Served
from instep.frontends.shards import Shard
from instep.frontends.zmq import encode
from instep.frontends.zmq.decode import Decoder
from instep.frontends.zmq.peers import Peer
from instep.security.policy import Verb, looked_up
from instep.streaming.operations import StreamOperations
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Header, Kind, Message

Answer: TypeAlias = Callable[[], Awaitable[tuple[I32, Message]]]
"""Carries out a request on N streams; returns codes of refusals, int32 [N], and the reply."""


@dataclass(slots=True, eq=False)
class Requests:
    """Decodes requests, raising MalformedMessage or Refusal. Each method returns an `Answer`."""

    served: Served
    decoder: Decoder
    shard: Shard

    @property
    def _operations(self) -> StreamOperations:
        return self.served.service.operations

    @property
    def _durability(self) -> str:
        return self.shard.durability(self.served.info.durability)

    def open(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode OPEN."""
        count = self.decoder.count(header.fields[0])
        names = wire.unpack_names(parts[1], count)
        states = self.decoder.states(header.fields[1], parts[2], count)
        first_seqs = self.decoder.first_seqs(header.fields[2], parts[3], count)
        self.served.refuse_what_is_new()
        codes = self.decoder.name_codes(names, peer.principal)
        codes[codes == 0] = self.decoder.state_codes(states, count)[codes == 0]
        codes[self.shard.are_foreign(names)] = Code.WRONG_SHARD
        good = np.flatnonzero(codes == 0)

        async def answer() -> tuple[I32, Message]:
            opened = await self._operations.open(
                peer,
                [names[index] for index in good.tolist()],
                None if states is None else states[good],
                None if first_seqs is None else first_seqs[good],
            )
            granted = opened.spread(codes)
            self.shard.redirect(names, granted.codes, granted.expected_seqs)
            return granted.codes, encode.granted(Kind.OPENED, header.request, granted, self._durability)

        return answer

    def resume(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode RESUME."""
        count = self.decoder.count(header.fields[0])
        take_over = bool(wire.count_field(header.fields[1], "take_over", 1, at_least=0))
        names = wire.unpack_names(parts[1], count)
        looked = looked_up(peer.principal, Verb.RESUME, names)
        claims = wire.array_frame(parts[2], wire.CLAIM, (count,), "claims")
        self.served.refuse_what_is_new()

        async def answer() -> tuple[I32, Message]:
            resumed = await self._operations.resume(peer, looked, claims["have"], claims["epoch"], take_over)
            self.shard.redirect(names, resumed.codes, resumed.expected_seqs)
            return resumed.codes, encode.granted(Kind.RESUMED, header.request, resumed, self._durability)

        return answer

    def read_state(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode READ_STATE."""
        count = self.decoder.count_with_states(header.fields[0])
        names, expected_seqs = [], np.zeros(count, np.int64)
        if wire.count_field(header.fields[1], "by_name", 1, at_least=0):
            names = wire.unpack_names(parts[1], count)
            read_states = partial(self._operations.read_states, looked_up(peer.principal, Verb.READ_STATE, names))
        else:
            handles = self.decoder.handles(parts[1], count)
            read_states = partial(self._operations.read_own_states, peer, handles)

        async def answer() -> tuple[I32, Message]:
            read = await read_states()
            if names:
                self.shard.redirect(names, read.codes, expected_seqs)
            return read.codes, encode.state_read(header.request, read, expected_seqs)

        return answer

    def reset(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode RESET."""
        count = self.decoder.count(header.fields[0])
        states = self.decoder.states(header.fields[1], parts[2], count)
        handles = self.decoder.handles(parts[1], count)
        self.served.refuse_what_is_new()
        refused = self.decoder.state_codes(states, count)

        async def answer() -> tuple[I32, Message]:
            codes = await self._operations.write_states(peer, handles, states, refused)
            return codes, encode.changed(header.request, codes)

        return answer

    def fork(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode FORK."""
        count = self.decoder.count_with_states(header.fields[0])
        names = wire.unpack_names(parts[2], count)
        handles = self.decoder.handles(parts[1], count)
        self.served.refuse_what_is_new()
        refused = self.decoder.name_codes(names, peer.principal)
        refused[self.shard.are_foreign(names)] = Code.WRONG_SHARD

        async def answer() -> tuple[I32, Message]:
            forked = await self._operations.fork(peer, handles, names, refused)
            self.shard.redirect(names, forked.codes, forked.expected_seqs)
            return forked.codes, encode.granted(Kind.OPENED, header.request, forked, self._durability)

        return answer

    def close(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode CLOSE."""
        count = self.decoder.count_with_states(header.fields[0])
        closings = wire.array_frame(parts[1], wire.CLOSING, (count,), "closings")

        async def answer() -> tuple[I32, Message]:
            states, codes = await self._operations.close(peer, closings["handle"], closings["have"])
            return codes, encode.closed(header.request, states, codes)

        return answer

    def remove(self, peer: Peer, header: Header, parts: list[bytes]) -> Answer:
        """Decode REMOVE."""
        count = self.decoder.count(header.fields[0])
        park = bool(wire.count_field(header.fields[1], "park", 1, at_least=0))
        names, expected_seqs = wire.unpack_names(parts[1], count), np.zeros(count, np.int64)
        looked = looked_up(peer.principal, Verb.REMOVE, names)

        async def answer() -> tuple[I32, Message]:
            codes = await self._operations.remove(looked, park=park)
            self.shard.redirect(names, codes, expected_seqs)
            return codes, encode.changed(header.request, codes, expected_seqs)

        return answer


Handler: TypeAlias = Callable[[Requests, Peer, Header, list[bytes]], Answer]
HANDLERS: Final[dict[Kind, tuple[Verb, Handler]]] = {
    Kind.OPEN: (Verb.OPEN, Requests.open),
    Kind.RESUME: (Verb.RESUME, Requests.resume),
    Kind.READ_STATE: (Verb.READ_STATE, Requests.read_state),
    Kind.RESET: (Verb.USE, Requests.reset),
    Kind.FORK: (Verb.OPEN, Requests.fork),
    Kind.CLOSE: (Verb.USE, Requests.close),
    Kind.REMOVE: (Verb.REMOVE, Requests.remove),
}
"""Verbs and handlers by kind of message."""
