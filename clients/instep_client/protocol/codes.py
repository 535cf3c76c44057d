"""Why something was refused or ended: one number and one sentence each. Standard library only."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

PROTOCOL_VERSION: Final = 8
DEFAULT_ENDPOINT: Final = "tcp://127.0.0.1:5757"
MAX_NAME_BYTES: Final = 200
MAX_MODEL_NAME_LENGTH: Final = 100
"""Characters."""
HAVE_ALL: Final = 2**64 - 1
"""The `have` of a claimant that does not know how many outputs it has."""
UNKNOWN: Final = 2**64 - 1
"""In a list of streams: the next seq of a hibernating stream, and the time left of one that never expires."""


class Place(IntEnum):
    """The place of a stream."""

    CONNECTED = 1
    PARKED = 2
    HIBERNATING = 3


class Code(IntEnum):
    """Why something was refused or ended. 1–99: the sender's message; 100–199: a stream; 200–299: the server."""

    MALFORMED = 1
    TOO_LARGE = 2
    WRONG_VERSION = 3
    HELLO_FIRST = 4
    WRONG_SHAPE = 5
    WRONG_DTYPE = 6
    REPEATED_STREAM = 7
    BAD_NAME = 8
    UNKNOWN_MODEL = 9
    NOT_ALLOWED = 10
    NOT_FINITE = 100
    SEQ_GAP = 101
    SEQ_REPEATED = 102
    UNKNOWN_STREAM = 103
    FOREIGN_STREAM = 104
    NAME_IN_USE = 105
    IDLE = 106
    CLIENT_GONE = 107
    EXPIRED = 108
    FENCED = 109
    DATA_LOSS = 110
    CONFLICT = 111
    WINDOW_FULL = 112
    OUTPUTS_GONE = 113
    ACK_AHEAD = 115
    FRAMES_PENDING = 117
    HIBERNATED = 118
    UNLOADED = 119
    BY_OPERATOR = 120
    BUSY = 200
    TOO_MANY_STREAMS = 201
    STEP_FAILED = 202
    STATE_LOST = 203
    SHUTTING_DOWN = 204
    INTERNAL = 205

    @classmethod
    def _missing_(cls, value: object) -> Code | None:
        """Codes of later servers have names too: STEPPED carries numbers without sentences."""
        if type(value) is not int or not 0 < value < 2**32:
            return None
        code = int.__new__(cls, value)
        code._name_, code._value_ = f"CODE_{value}", value
        return code


SENTENCES: Final[dict[Code, str]] = {
    Code.MALFORMED: "the message does not follow the protocol",
    Code.TOO_LARGE: "the message is larger than this server accepts; send it in smaller parts",
    Code.WRONG_VERSION: f"client and server speak different protocol versions (the server speaks {PROTOCOL_VERSION})",
    Code.HELLO_FIRST: "this connection has not said HELLO, or the server was restarted; connect again",
    Code.WRONG_SHAPE: "the array's shape does not fit the model",
    Code.WRONG_DTYPE: "frames must be float32 (dtype 1)",
    Code.REPEATED_STREAM: "a block may hold each stream only once",
    Code.BAD_NAME: f"a stream's name must be 1 to {MAX_NAME_BYTES} bytes of printable UTF-8",
    Code.UNKNOWN_MODEL: "this server serves no model of that name",
    Code.NOT_ALLOWED: "the key of this client does not permit this; the server's operator decides what it may do",
    Code.NOT_FINITE: "the frame or state holds NaN or infinity; it was not applied and the stream's state is unchanged",
    Code.SEQ_GAP: "an earlier frame of this stream is missing; send from the expected seq",
    Code.SEQ_REPEATED: "this frame was already applied, and its output is not ready yet or no longer kept",
    Code.UNKNOWN_STREAM: "no such stream is open: it was never opened, or it was closed or evicted",
    Code.FOREIGN_STREAM: "the stream belongs to another connection",
    Code.NAME_IN_USE: "a stream of this name is already open, or parked; a parked one is resumed, not opened",
    Code.IDLE: "the stream was evicted because it sent nothing for longer than limits.max_idle_s",
    Code.CLIENT_GONE: "the stream was evicted because its connection went away or stopped reading",
    Code.EXPIRED: "the stream was parked or idle for longer than limits.park_s or limits.max_idle_s, and its state is "
    "gone",
    Code.FENCED: "the stream was taken over or resumed again; this handle may not use it any more",
    Code.DATA_LOSS: "the server holds fewer frames of this stream than the client was given outputs for",
    Code.CONFLICT: "a frame of this seq was applied with other values; it was not applied again",
    Code.WINDOW_FULL: "the frame is beyond the stream's window; take and acknowledge earlier outputs first",
    Code.OUTPUTS_GONE: "outputs after those that the client holds are no longer kept, and cannot be sent again",
    Code.ACK_AHEAD: "the message acknowledges an output that has not been computed yet",
    Code.FRAMES_PENDING: "frames or outputs of this stream are still in flight; ask again when they have arrived",
    Code.HIBERNATED: "the stream was idle and has left memory; the server wakes it: wait for its new handle (WOKEN)",
    Code.UNLOADED: "the stream was ended because its model was unloaded, and no recording keeps it",
    Code.BY_OPERATOR: "an operator of the server closed the stream or parked it; a parked one can be resumed",
    Code.BUSY: "the server's queue is full; nothing of this message was applied; send it again later",
    Code.TOO_MANY_STREAMS: "engine.max_streams streams are in memory, parked ones included: close some, raise the "
    "limit, or try later where the server records, since streams that do nothing for 1 s make room there",
    Code.STEP_FAILED: "the network's step failed on the server; the frame was not applied; see the server's log",
    Code.STATE_LOST: "a failure of the server lost the stream's state, and the stream was closed; see the server's log",
    Code.INTERNAL: "the server could not read the message, which is a bug; nothing was applied, and its log says more",
    Code.SHUTTING_DOWN: "the server is shutting down and takes nothing new",
}


def sentence_of(code: Code) -> str:
    """The sentence of a code, for messages without one."""
    return SENTENCES.get(code, f"code {code}")
