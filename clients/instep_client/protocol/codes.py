"""Why something was refused or ended: one number and one sentence each. Standard library only."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, Self

PROTOCOL_VERSION: Final = 9
DEFAULT_ENDPOINT: Final = "tcp://127.0.0.1:5757"
MAX_NAME_BYTES: Final = 200
MAX_MODEL_NAME_LENGTH: Final = 100
"""The most characters in a model's name."""
HAVE_ALL: Final = 2**64 - 1
"""The `have` of a claimant that does not know how many outputs it has."""
UNKNOWN: Final = 2**64 - 1
"""The value in lists of streams for the next seq of a hibernating stream, and for the time left of one that never
expires.
"""


class Place(IntEnum):
    """The place of a stream."""

    CONNECTED = 1
    PARKED = 2
    HIBERNATING = 3


class Code(IntEnum):
    """Why something was refused or ended. 1–99: the sender's message; 100–199: a stream; 200–299: the server."""

    sentence: str
    """The reason and, if there is one, the cure."""

    def __new__(cls, value: int, sentence: str = "") -> Self:
        """Make a member from its number and sentence."""
        code = int.__new__(cls, value)
        code._value_, code.sentence = value, sentence
        return code

    MALFORMED = 1, "the message does not follow the protocol"
    TOO_LARGE = 2, "the message is larger than this server accepts; send it in smaller parts"
    WRONG_VERSION = 3, f"client and server speak different protocol versions (the server speaks {PROTOCOL_VERSION})"
    HELLO_FIRST = 4, "this connection has not said HELLO, or the server was restarted; connect again"
    WRONG_SHAPE = 5, "the array's shape does not fit the model"
    WRONG_DTYPE = 6, "frames must be float32 (dtype 1)"
    REPEATED_STREAM = 7, "a block may hold each stream only once"
    BAD_NAME = 8, f"a stream's name must be 1 to {MAX_NAME_BYTES} bytes of printable UTF-8"
    UNKNOWN_MODEL = 9, "this server serves no model of that name"
    NOT_ALLOWED = 10, "the key of this client does not permit this; the server's operator decides what it may do"
    NOT_FINITE = 100, "the frame or state holds NaN or infinity; it was not applied and the stream's state is unchanged"
    SEQ_GAP = 101, "an earlier frame of this stream is missing; send from the expected seq"
    SEQ_REPEATED = 102, "this frame was already applied, and its output is not ready yet or no longer kept"
    UNKNOWN_STREAM = 103, "no such stream is open: it was never opened, or it was closed or evicted"
    FOREIGN_STREAM = 104, "the stream belongs to another connection"
    NAME_IN_USE = 105, "a stream of this name is already open, or parked; a parked one is resumed, not opened"
    IDLE = 106, "the stream was evicted because it sent nothing for longer than limits.max_idle_s"
    CLIENT_GONE = 107, "the stream was evicted because its connection went away or stopped reading"
    EXPIRED = (
        108,
        "the stream was parked or idle for longer than limits.park_s or limits.max_idle_s, and its state is gone",
    )
    FENCED = 109, "the stream was taken over or resumed again; this handle may not use it any more"
    DATA_LOSS = 110, "the server holds fewer frames of this stream than the client was given outputs for"
    CONFLICT = 111, "a frame of this seq was applied with other values; it was not applied again"
    WINDOW_FULL = 112, "the frame is beyond the stream's window; take and acknowledge earlier outputs first"
    OUTPUTS_GONE = 113, "outputs after those that the client holds are no longer kept, and cannot be sent again"
    ACK_AHEAD = 115, "the message acknowledges an output that has not been computed yet"
    FRAMES_PENDING = 117, "frames or outputs of this stream are still in flight; ask again when they have arrived"
    HIBERNATED = 118, "the stream was idle and has left memory; the server wakes it: wait for its new handle (WOKEN)"
    UNLOADED = 119, "the stream was ended because its model was unloaded, and no recording keeps it"
    WRONG_SHARD = (
        120,
        "the name belongs to another shard of the cluster: connect to that one (SHARDS tells where); a fork stays in "
        "its stream's shard, while a snapshot can be restored in any",
    )
    BY_OPERATOR = 121, "an operator of the server closed the stream or parked it; a parked one can be resumed"
    BUSY = 200, "the server's queue is full; nothing of this message was applied; send it again later"
    TOO_MANY_STREAMS = (
        201,
        "engine.max_streams streams are in memory, parked ones included: close some, raise the limit, or try later "
        "where the server records, since streams that do nothing for 1 s make room there",
    )
    STEP_FAILED = 202, "the network's step failed on the server; the frame was not applied; see the server's log"
    STATE_LOST = 203, "a failure of the server lost the stream's state, and the stream was closed; see the server's log"
    SHUTTING_DOWN = 204, "the server is shutting down and takes nothing new"
    INTERNAL = 205, "the server could not read the message, which is a bug; nothing was applied, and its log says more"

    @classmethod
    def _missing_(cls, value: object) -> Code | None:
        """Give codes of later servers a name too, because STEPPED has numbers without sentences."""
        if type(value) is not int or not 0 < value < 2**32:
            return None
        code = int.__new__(cls, value)
        code._name_, code._value_, code.sentence = f"CODE_{value}", value, f"code {value}"
        return code
