"""Decodes peers' messages, and checks every field before any is used. It does no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from instep.core.typing import I32, I64, U8, U64
from instep.security.policy import Verb, allowed
from instep.security.principals import Principal
from instep.streaming.api import Refusal
from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.state_spec import StateSpec
from instep_client.protocol.wire import DTYPE_F32, Code, Header, unpack_step

_AUTOMATIC_ID_BYTES: Final = 5
"""The length of the routing ids that ZeroMQ generates; their first byte is 0."""


def hello(header: Header, routing_id: bytes) -> tuple[str, str]:
    """Decode HELLO: the client's name, and the model's name, empty for the default. Raises as `Decoder` does."""
    version, name, model = header.fields
    if version != wire.PROTOCOL_VERSION:
        raise Refusal(Code.WRONG_VERSION, f"the client speaks {version!r:.20}")
    text(name, "the client's name")
    text(model, "the model's name")
    if routing_id[0] != 0 or len(routing_id) != _AUTOMATIC_ID_BYTES:
        raise MalformedMessage("set no routing id (ZMQ_IDENTITY): the server names connections itself")
    return name, model


def text(field: Any, name: str) -> str:
    """Check that a header field is text; raises as `Decoder` does."""
    if type(field) is not str:
        raise MalformedMessage(f"{name} must be text")
    return field


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes messages of the peers of one model. Its methods raise MalformedMessage or Refusal."""

    features: int
    state: StateSpec
    max_block_frames: int
    max_message_bytes: int

    def check_step(self, parts: list[bytes]) -> None:
        """Check a STEP. Admission judges the contents of columns and frames."""
        _, timesteps, width, features, dtype = unpack_step(parts)
        if dtype != DTYPE_F32:
            raise Refusal(Code.WRONG_DTYPE, f"this block says {dtype}")
        if features != self.features:
            raise Refusal(Code.WRONG_SHAPE, f"the model takes {self.features} features, not {features}")
        if timesteps * width > self.max_block_frames:
            raise Refusal(Code.TOO_LARGE, f"at most {self.max_block_frames} frames a block")
        shape = [timesteps, width, features]
        if len(parts[1]) != 4 * math.prod(shape):
            raise MalformedMessage(f"x must be {4 * math.prod(shape)} bytes for shape {shape}, it is {len(parts[1])}")

    def listing(self, header: Header, prefix: bytes) -> tuple[int, int, int, str]:
        """Decode LIST: cursor, the most streams, place and prefix."""
        cursor, most, place = header.fields
        wire.count_field(cursor, "the cursor", 2**62, at_least=0)
        wire.count_field(most, "the most streams", wire.MAX_BLOCK_STREAMS)
        wire.count_field(place, "the place", max(wire.Place), at_least=0)
        if len(prefix) > wire.MAX_NAME_BYTES:
            raise MalformedMessage(f"names have at most {wire.MAX_NAME_BYTES} bytes, and so has what they begin with")
        try:
            return cursor, most, place, prefix.decode()
        except UnicodeDecodeError:
            raise MalformedMessage("what the names begin with is not UTF-8") from None

    def count(self, field: Any) -> int:
        """The number of streams, N."""
        return wire.count_field(field, "N", wire.MAX_BLOCK_STREAMS)

    def count_with_states(self, field: Any) -> int:
        """The number of streams, N, bounded so that N states fit into the reply."""
        count = self.count(field)
        if count * self.state.row_bytes > self.max_message_bytes:
            raise Refusal(Code.TOO_LARGE, "their states do not fit into one message")
        return count

    def handles(self, frame: bytes, count: int) -> U64:
        """The handles, uint64 [N]."""
        handles: U64 = wire.array_frame(frame, "<u8", (count,), "handles")
        return handles

    def states(self, has_states: Any, frame: bytes, count: int) -> U8 | None:
        """Decode states, uint8 [N, row_bytes]; None if the header announces none."""
        if not wire.count_field(has_states, "has_states", 1, at_least=0):
            if len(frame):
                raise MalformedMessage("the header says that no states follow, the states frame is not empty")
            return None
        if len(frame) != count * self.state.row_bytes:
            raise Refusal(Code.WRONG_SHAPE, f"states must be {count} rows of {self.state.row_bytes} bytes")
        states: U8 = wire.array_frame(frame, np.uint8, (count, self.state.row_bytes), "states")
        return states

    def state_codes(self, states: U8 | None, count: int) -> I32:
        """int32 [N]: NOT_FINITE for states with NaN, infinity, or a bool that is neither 0 nor 1."""
        codes = np.zeros(count, np.int32)
        if states is not None:
            codes[~self.state.valid(states)] = Code.NOT_FINITE
        return codes

    def name_codes(self, names: list[str], principal: Principal) -> I32:
        """int32 [N], for streams to be opened: BAD_NAME for names that none may have, NOT_ALLOWED for foreign ones."""
        codes = np.array([0 if wire.name_is_good(name) else Code.BAD_NAME for name in names], np.int32)
        if not allowed(principal, Verb.OPEN, *names):
            foreign = [not allowed(principal, Verb.OPEN, name) for name in names]
            codes[(codes == 0) & foreign] = Code.NOT_ALLOWED
        return codes

    def first_seqs(self, has_seqs: Any, frame: bytes, count: int) -> I64 | None:
        """Decode first seqs, int64 [N]; None if the header announces none."""
        if not wire.count_field(has_seqs, "has_seqs", 1, at_least=0):
            if len(frame):
                raise MalformedMessage("the header says that no first seqs follow, their frame is not empty")
            return None
        seqs: U64 = wire.array_frame(frame, "<u8", (count,), "first seqs")
        if int(seqs.max()) >= 2**62:
            raise MalformedMessage("a first seq must be below 2^62")
        return seqs.astype(np.int64)
