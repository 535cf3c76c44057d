"""STEP messages, read and checked; but for what their frames hold, which is looked at when they are admitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from instep.server.burst import Step
from instep.server.clients import Client
from instep.server.refusal import Refusal
from instep_client.protocol import wire
from instep_client.protocol.wire import HEADER_LENGTH, Code, Header, Kind

_HEAD: Final = bytes((0x90 | HEADER_LENGTH[Kind.STEP], Kind.STEP))
"""How the header of each begins, as msgpack writes it: an array of so many, the kind."""
_MARKERS: Final = {2: 0xCC, 3: 0xCD, 5: 0xCE, 9: 0xCF}
"""What msgpack puts before an unsigned integer, by how many bytes both take; a small one is its own."""


@dataclass(frozen=True, slots=True)
class _Good:
    """A message that was found good, in what others like it share."""

    fields: bytes
    """The header from behind the request on."""
    column_bytes: int
    x_bytes: int
    timesteps: int
    columns: int
    frames: int


class StepMessages:
    """Reads STEP messages.

    Most differ from the one before in nothing but their request and what their frames hold. Where the bytes of the
    header before and after the request are the same, and the frames of the same sizes, so is all that was checked; to
    compare them takes a third as long as to check it.

    Args:
        features: width of an input.
        max_block_frames: the most frames a message may have.
    """

    def __init__(self, features: int, max_block_frames: int) -> None:
        self._features = features
        self._max_block_frames = max_block_frames
        self._good = _Good(b"", -1, -1, 0, 0, 0)
        """The newest one that was checked."""

    def alike(self, client: Client, frames: Sequence[bytes]) -> Step | None:
        """A message that is like the newest one that was checked, and so good by itself; None for any other."""
        good = self._good
        if len(frames) != 3:
            return None
        header, column, x = frames
        fields = good.fields
        if len(column) != good.column_bytes or len(x) != good.x_bytes or not header.endswith(fields):
            return None
        if not header.startswith(_HEAD) or (request := _request(header[2 : len(header) - len(fields)])) is None:
            return None
        return Step(client, request, good.timesteps, good.columns, good.frames, column, x, client.last_heard_ns)

    def read(self, client: Client, header: Header, frames: Sequence[bytes]) -> Step:
        """Any message, with its header as `wire.unpack_header` read it.

        Raises:
            MalformedMessage, Refusal: what is wrong with it.
        """
        timesteps, columns, features, dtype = header.fields
        wire.count_field(timesteps, "T", 2**31)
        wire.count_field(columns, "N", wire.MAX_BLOCK_STREAMS)
        if dtype != wire.F32_NAME:
            raise Refusal(Code.WRONG_DTYPE, f"this block says {dtype!r:.20}")
        if type(features) is not int or features != self._features:
            raise Refusal(Code.WRONG_SHAPE, f"the model takes {self._features} features, not {features!r:.20}")
        if timesteps * columns > self._max_block_frames:
            raise Refusal(Code.TOO_LARGE, f"at most {self._max_block_frames} frames a block")
        wire.check_size(frames[2], 4, (timesteps, columns, features), "x")
        wire.check_size(frames[1], wire.COLUMN_BYTES, (columns,), "columns")
        packed = wire.pack_header(Kind.STEP, 0, *header.fields)  # this one may be written in another way
        size = timesteps * columns
        self._good = _Good(packed[len(_HEAD) + 1 :], len(frames[1]), len(frames[2]), timesteps, columns, size)
        return Step(client, header.request, timesteps, columns, size, frames[1], frames[2], client.last_heard_ns)


def _request(packed: bytes) -> int | None:
    """The number that these bytes are as msgpack, if they are one that a request may have."""
    size = len(packed)
    if size == 1:
        return packed[0] if packed[0] < 128 else None
    if size not in _MARKERS or packed[0] != _MARKERS[size]:
        return None
    request = int.from_bytes(packed[1:])
    return request if request < 2**63 else None
