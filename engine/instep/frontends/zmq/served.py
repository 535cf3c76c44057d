"""A model as its connections see it: what WELCOME says of it, and the requests on its streams."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import I32
from instep.frontends.zmq import encode
from instep.frontends.zmq.decode import Decoder
from instep.streaming.api import Grants, Origin, Refusal
from instep.streaming.service import ModelService
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Header, Kind, Message, ServerInfo

Answer: TypeAlias = tuple[I32, Message]
"""To a request on N streams: why they were refused, int32 [N], 0 where they were not; and the message that says it."""


@dataclass(slots=True, eq=False)
class Served:
    """A model, as the connections that belong to it see it. Its requests raise MalformedMessage or Refusal."""

    service: ModelService
    info: ServerInfo
    decoder: Decoder

    def keep_as(self, name: str) -> None:
        """Be another name's from now on, for the connections and streams there are: another version has replaced it."""
        self.service.name, self.service.is_former = name, True
        self.info = replace(self.info, model=name)

    def refuse_what_is_new(self) -> None:
        """Refuse new connections, streams and frames, unless the service takes them."""
        if not self.service.is_ready:
            if self.service.engine.journal.has_failed:
                raise Refusal(Code.SHUTTING_DOWN, "its recording has failed")
            raise Refusal(Code.SHUTTING_DOWN, sentence=self.service.leaves)

    def summary(self) -> tuple[int, int, int, int, int]:
        """The fields of `wire.MODEL`."""
        engine = self.service.engine
        streams = engine.table.open_count + len(self.service.operations.hibernation)
        return engine.stats.frames_total, streams, len(engine.origins), self.info.features, self.info.outputs

    async def open(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """OPEN."""
        count = self.decoder.count(header.fields[0])
        names = wire.unpack_names(parts[1], count)
        states = self.decoder.states(header.fields[1], parts[2], count)
        first_seqs = self.decoder.first_seqs(header.fields[2], parts[3], count)
        self.refuse_what_is_new()
        codes = self.decoder.name_codes(names)
        codes[codes == 0] = self.decoder.state_codes(states, count)[codes == 0]
        good = np.flatnonzero(codes == 0)
        opened = await self.service.operations.open(
            origin,
            [names[index] for index in good.tolist()],
            None if states is None else states[good],
            None if first_seqs is None else first_seqs[good],
        )
        granted = opened.spread(codes)
        return granted.codes, encode.granted(Kind.OPENED, header.request, granted, self.info.durability)

    async def resume(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """RESUME."""
        count = self.decoder.count(header.fields[0])
        take_over = wire.count_field(header.fields[1], "take_over", 1, at_least=0)
        names = wire.unpack_names(parts[1], count)
        claims = wire.array_frame(parts[2], wire.CLAIM, (count,), "claims")
        self.refuse_what_is_new()
        resumed = await self.service.operations.resume(origin, names, claims["have"], claims["epoch"], bool(take_over))
        return resumed.codes, encode.granted(Kind.RESUMED, header.request, resumed, self.info.durability)

    async def read_state(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """READ_STATE."""
        count = self.decoder.count_with_states(header.fields[0])
        if wire.count_field(header.fields[1], "by_name", 1, at_least=0):
            read = await self.service.operations.read_states(wire.unpack_names(parts[1], count))
        else:
            read = await self.service.operations.read_own_states(origin, self.decoder.handles(parts[1], count))
        return read.codes, encode.state_read(header.request, read)

    async def reset(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """RESET."""
        count = self.decoder.count(header.fields[0])
        states = self.decoder.states(header.fields[1], parts[2], count)
        handles = self.decoder.handles(parts[1], count)
        self.refuse_what_is_new()
        codes = self.decoder.state_codes(states, count)
        codes = await self.service.operations.write_states(origin, handles, states, codes)
        return codes, encode.changed(header.request, codes)

    async def fork(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """FORK."""
        count = self.decoder.count_with_states(header.fields[0])
        names = wire.unpack_names(parts[2], count)
        handles = self.decoder.handles(parts[1], count)
        self.refuse_what_is_new()
        forked: Grants = await self.service.operations.fork(origin, handles, names, self.decoder.name_codes(names))
        return forked.codes, encode.granted(Kind.OPENED, header.request, forked, self.info.durability)

    async def close(self, origin: Origin, header: Header, parts: list[bytes]) -> Answer:
        """CLOSE."""
        count = self.decoder.count_with_states(header.fields[0])
        closings = wire.array_frame(parts[1], wire.CLOSING, (count,), "closings")
        states, codes = await self.service.operations.close(origin, closings["handle"], closings["have"])
        return codes, encode.closed(header.request, states, codes)


Handler: TypeAlias = Callable[[Served, Origin, Header, list[bytes]], Awaitable[Answer]]
HANDLERS: Final[dict[Kind, Handler]] = {
    Kind.OPEN: Served.open,
    Kind.RESUME: Served.resume,
    Kind.READ_STATE: Served.read_state,
    Kind.RESET: Served.reset,
    Kind.FORK: Served.fork,
    Kind.CLOSE: Served.close,
}
"""The requests on streams, which run as tasks."""
