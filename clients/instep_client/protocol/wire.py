"""The wire: message kinds, codes and layouts, shared by the client and the engine.

One ZeroMQ message is a list of frames. Frame 0 is the header: a short msgpack array of fixed length whose first two
elements are the message kind and the request number. The frames after it are raw little-endian arrays; their number and
contents depend on the kind alone (`Kind`). `docs/protocol.md` specifies them.

STEP and STEPPED, which carry the frames of streams, have binary headers of fixed size instead, and records behind them:

    STEP     frame 0: header (24 bytes), COLUMN [N]                    frame 1: x float32 [T, N, features]
    STEPPED  frame 0: header (32 bytes), ANSWERED [M], FAILURE [F]     frame 1: y float32 [T, N, outputs]

Their first byte is the kind. That of every other message is at least 0x90, with which a msgpack array begins.

This module opens no socket and keeps no state.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, Self, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from instep_client.protocol.codes import DEFAULT_ENDPOINT as DEFAULT_ENDPOINT
from instep_client.protocol.codes import HAVE_ALL as HAVE_ALL
from instep_client.protocol.codes import MAX_MODEL_NAME_LENGTH as MAX_MODEL_NAME_LENGTH
from instep_client.protocol.codes import MAX_NAME_BYTES as MAX_NAME_BYTES
from instep_client.protocol.codes import PROTOCOL_VERSION as PROTOCOL_VERSION
from instep_client.protocol.codes import UNKNOWN as UNKNOWN
from instep_client.protocol.codes import Code as Code
from instep_client.protocol.codes import Place as Place
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.state_spec import StateSpec

MAX_HEADER_BYTES: Final = 4096
MAX_BLOCK_STREAMS: Final = 65_535
"""The most columns one OPEN, STEP or CLOSE may carry."""
MAX_SHARDS: Final = 4096
"""The most shards of a cluster."""

Frame: TypeAlias = bytes | memoryview
Message: TypeAlias = list[Frame]
F32: TypeAlias = npt.NDArray[np.float32]
U64: TypeAlias = npt.NDArray[np.uint64]
FailureArray: TypeAlias = npt.NDArray[np.void]
GrantArray: TypeAlias = npt.NDArray[np.void]

COLUMN: Final = np.dtype([("handle", "<u8"), ("seq", "<u8"), ("acked", "<u8")])
"""One column of a STEP block: the stream's handle, the seq of the block's first timestep, and the seq before which the
client has received every output (24 bytes)."""

COLUMN_BYTES: Final = COLUMN.itemsize

GRANT: Final = np.dtype([("handle", "<u8"), ("epoch", "<u8"), ("next_seq", "<u8")])
"""A stream granted to its owner: the handle to use from now on (0 if refused), the epoch of this ownership, and the seq
that the server expects next (24 bytes).
"""

CLAIM: Final = np.dtype([("have", "<u8"), ("epoch", "<u8")])
"""A stream to resume: the client has the outputs of seqs below `have` (`HAVE_ALL` for all that the server gave), and
the epoch under which it owned the stream (16 bytes).
"""

CLOSING: Final = np.dtype([("handle", "<u8"), ("have", "<u8")])
"""A stream to close: its handle, and `have` as in `CLAIM` (16 bytes)."""

LISTING: Final = np.dtype(
    [("next_seq", "<u8"), ("idle_us", "<u8"), ("expires_in_us", "<u8"), ("place", "<u4"), ("pending", "<u4")]
)
"""A stream in LISTED: the seq of its next frame (`UNKNOWN` while it hibernates), how long it has been idle, how long
the server keeps it if it stays idle (`UNKNOWN` if it never expires), its `Place`, and its pending frames (32 bytes)."""

MODEL: Final = np.dtype(
    [("frames", "<u8"), ("streams", "<u4"), ("connections", "<u4"), ("features", "<u4"), ("outputs", "<u4")]
)
"""A model in SERVED: the frames stepped since it was started, its open streams, hibernating ones included, its
connections, and the widths of its frames (24 bytes)."""

FAILURE: Final = np.dtype(
    [("column", "<u4"), ("timestep", "<u4"), ("code", "<u4"), ("reserved", "<u4"), ("expected_seq", "<u8")]
)
"""One failed column: its frames from `timestep` on were not applied, and the stream now expects `expected_seq` (24
bytes).
"""

NO_FAILURES: Final[FailureArray] = np.empty(0, FAILURE)


class Kind(IntEnum):
    """A kind of message: its number, the elements of its msgpack header, and its number of frames.

    The number is the first byte of a binary header, and the first element of every other.
    """

    elements: int
    """The number of elements in the msgpack header, including kind and request number; 0 for a binary header."""
    frames: int

    def __new__(cls, value: int, elements: int = 0, frames: int = 0) -> Self:
        """Make a member from its number and sizes."""
        kind = int.__new__(cls, value)
        kind._value_, kind.elements, kind.frames = value, elements, frames
        return kind

    # Comments list the header's elements after the request number | the frames after the header.
    HELLO = 1, 5, 1  # protocol version, client's name, model (empty for the default)
    # N, whether initial states follow (0 or 1), whether first seqs follow (0 or 1)
    # | names (UTF-8, one a line), states [N, row_bytes] or empty, first seqs uint64 [N] or empty
    OPEN = 2, 5, 4
    STEP = 3, 0, 2
    CLOSE = 4, 3, 2  # N | closings [N]
    PING = 5, 2, 1  # either side may ask; the server's number says how many bytes it has sent
    STATS = 6, 2, 1
    RESUME = 7, 4, 3  # N, whether to take the streams over (0 or 1) | names, claims [N]
    READ_STATE = 8, 4, 2  # N, whether streams are named (1) or given by handle (0) | handles uint64 [N], or names
    RESET = 9, 4, 3  # N, whether states follow (0 or 1) | handles uint64 [N], states [N, row_bytes] or empty
    FORK = 10, 3, 3  # N | handles uint64 [N], names of the copies
    LIST = 11, 5, 2  # cursor (0 at first), the most streams, place (0 for any) | what the names begin with
    MODELS = 12, 2, 1
    REMOVE = 13, 4, 2  # N, whether to park the streams (1) or close them (0) | names
    SHARDS = 16, 2, 1  # where all shards are
    WELCOME = 65, 23, 2  # see ServerInfo | names of the outputs, or empty
    OPENED = 66, 5, 3  # N, durability, sentences | grants [N], failures
    STEPPED = 67, 0, 2
    CLOSED = 68, 4, 3  # N, sentences | final states [N, row_bytes] (floats NaN where refused), failures
    PONG = 69, 2, 1
    STATISTICS = 70, 3, 1  # [[name, value], …]
    EVICTED = 71, 5, 2  # (request 0) N, code, sentence | handles uint64 [N]
    ERROR = 72, 5, 1  # (request 0 when it could not be read) code, sentence, retry_after_us
    GOODBYE = 73, 3, 1  # (request 0) sentence
    RESUMED = 74, 5, 3  # N, durability, sentences | grants [N], failures
    STATE_READ = 75, 4, 4  # N, sentences | seqs uint64 [N], states [N, row_bytes] (as in CLOSED), failures
    CHANGED = 76, 4, 2  # N, sentences | failures
    LISTED = 77, 4, 3  # N, cursor of the next page (0 after the last) | names, listings [N]
    SERVED = 78, 3, 3  # N | names, models [N]
    MOVED = 79, 4, 3  # (request 0) N, fingerprint | handles uint64 [N], seqs uint64 [N]
    SHARDED = 80, 3, 3  # N | terms uint64 [N], endpoints (UTF-8, one a line, empty where nobody serves the shard)
    WOKEN = 81, 3, 3  # (request 0) N | former handles uint64 [N], new handles uint64 [N]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server and the connection's model as WELCOME describes them: the header's fields, and frame 1."""

    protocol_version: int
    boot_id: str
    """A new random value each time the server starts the model."""
    model: str
    fingerprint: str
    """The sha256 in hex of the description and the weights."""
    features: int
    outputs: int
    state: StateSpec
    """The state specification: `[name, shape, dtype, initial value]` for each leaf."""
    device: str
    exactness: str
    """`exact`: a frame has the same bits in every batch and on every processor. `tolerance`: it need not."""
    arithmetic: str
    """`portable-1`, or such as `torch 2.13 on cuda:0`, which promises no bits."""
    max_streams: int
    max_message_bytes: int
    """The largest raw frame that the server accepts; a larger one makes it drop the connection."""
    max_block_frames: int
    """The most frames (T × N) one STEP may carry."""
    credit_frames: int
    """The most unanswered frames of one connection; beyond it the answer is BUSY."""
    max_idle_s: float
    """Seconds after which a silent stream is evicted; 0 for never."""
    window_frames: int
    """The most frames of one stream from the first unacknowledged output on, including that one."""
    durability: str
    """The failures that answers survive: `memory` none, `commit` a killed process, `fsync` also a loss of power, and
    `copied` the loss of a machine."""
    park_s: float
    """Seconds for which a stream is kept after its connection is lost; 0 for not at all."""
    shard: int = 0
    """The number of the shard that the server is, from 0."""
    shards: int = 1
    """The number of shards of the cluster; 1 for a server that is on its own."""
    term: int = 0
    """The number of this server among those that the shard has had on any node; 0 without a directory."""
    output_names: tuple[str, ...] = ()
    """Names of the outputs, in order; empty if they have none."""

    def wire_fields(self) -> list[Any]:
        """The fields in the form that the header of WELCOME has."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "output_names"}
        return list((values | {"state": self.state.encode()}).values())


class Header(NamedTuple):
    """A checked msgpack header: its kind, request number and the fields after them."""

    kind: Kind
    request: int
    fields: tuple[Any, ...]


def pack_header(kind: Kind, request: int, *fields: Any) -> bytes:
    """One msgpack header as bytes."""
    return msgpack.packb([int(kind), request, *fields])


def unpack_header(frames: Sequence[Frame], max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Check and read a msgpack header in frame 0; check the number of frames.

    Checks lengths before values, and exact types; never trusts a count it has not checked.

    Raises:
        MalformedMessage: naming the invalid part.
    """
    if not frames or len(frames[0]) > max_bytes:
        raise MalformedMessage(f"the header must be 1 to {max_bytes} bytes")
    try:
        header = msgpack.unpackb(
            frames[0],
            use_list=False,
            max_array_len=256,
            max_map_len=0,
            max_ext_len=0,
            max_bin_len=0,
            max_str_len=1024,
        )
    except Exception as error:  # msgpack raises many types; all of them mean the same here
        raise MalformedMessage(f"the header is not msgpack of the allowed sizes: {error}") from None
    if type(header) is not tuple or len(header) < 2:
        raise MalformedMessage("the header must be an array of at least [kind, request]")
    kind_number, request = header[0], header[1]
    if type(kind_number) is not int or kind_number not in _KINDS:
        raise MalformedMessage(f"unknown message kind {kind_number!r:.40}")
    kind = _KINDS[kind_number]
    if type(request) is not int or not 0 <= request < 2**63:
        raise MalformedMessage("the request number must be an integer from 0 to 2^63 - 1")
    if len(header) != kind.elements:
        raise MalformedMessage(f"a {kind.name} header has {kind.elements} elements, this one {len(header)}")
    if len(frames) != kind.frames:
        raise MalformedMessage(f"a {kind.name} message has {kind.frames} frames, this one {len(frames)}")
    return Header(kind, request, header[2:])


_KINDS: Final = {int(kind): kind for kind in Kind if kind.elements}


def count_field(value: Any, name: str, at_most: int, at_least: int = 1) -> int:
    """An integer header field within bounds.

    Raises:
        MalformedMessage: naming the field.
    """
    if type(value) is not int or not at_least <= value <= at_most:
        raise MalformedMessage(f"{name} must be an integer from {at_least} to {at_most}")
    return value


def array_frame(frame: Frame, dtype: npt.DTypeLike, shape: tuple[int, ...], name: str) -> npt.NDArray[Any]:
    """A raw frame as a read-only array of that dtype and shape, without a copy.

    Raises:
        MalformedMessage: when the frame has the wrong number of bytes.
    """
    dtype = np.dtype(dtype)
    check_size(frame, dtype.itemsize, shape, name)
    return np.frombuffer(frame, dtype).reshape(shape)


def check_size(frame: Frame, itemsize: int, shape: tuple[int, ...], name: str) -> None:
    """Check the size of a raw frame that is an array of that shape.

    Raises:
        MalformedMessage: when it has the wrong number of bytes.
    """
    size = itemsize
    for extent in shape:
        size *= extent
    if len(frame) != size:
        raise MalformedMessage(f"{name} must be {size} bytes for shape {list(shape)}, it is {len(frame)}")


def raw(array: npt.NDArray[Any]) -> memoryview:
    """A contiguous array's bytes as a raw frame, without a copy."""
    return array.reshape(-1).view("u1").data


def pack_names(names: Sequence[str]) -> bytes:
    r"""The names frame of OPEN: UTF-8, one name a line, `\n` between."""
    return "\n".join(names).encode()


def unpack_names(frame: Frame, count: int) -> list[str]:
    """The names frame of OPEN as `count` strings, which `name_is_good` may still refuse.

    Raises:
        MalformedMessage: when it is not UTF-8 or has another number of names.
    """
    if len(frame) > count * (MAX_NAME_BYTES + 1) * 4:
        raise MalformedMessage("the names are too long")
    try:
        names = bytes(frame).decode().split("\n")
    except UnicodeDecodeError:
        raise MalformedMessage("the names are not UTF-8") from None
    if len(names) != count:
        raise MalformedMessage(f"the header says {count} names, the frame holds {len(names)}")
    return names


def name_is_good(name: str) -> bool:
    """Whether a name is valid for a stream: 1 to 200 bytes of UTF-8, printable."""
    return 0 < len(name) <= MAX_NAME_BYTES and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES


def shard_of(name: str, shards: int) -> int:
    """The shard of a stream: the CRC-32 of its name's UTF-8 bytes, modulo the number of shards."""
    return zlib.crc32(name.encode()) % shards


class ShardTable(NamedTuple):
    """SHARDED: where each shard of a cluster is served."""

    terms: U64
    """The term of each shard, uint64 [N]."""
    endpoints: tuple[str, ...]
    """The endpoint of each shard; empty where nobody serves it. The host `*` is the one that was asked."""

    def pack(self, request: int) -> Message:
        """SHARDED, in answer to a request."""
        return [
            pack_header(Kind.SHARDED, request, len(self.terms)),
            raw(self.terms),
            "\n".join(self.endpoints).encode(),
        ]

    @classmethod
    def unpack(cls, header: Header, frames: Sequence[Frame]) -> ShardTable:
        """Check and read SHARDED.

        Raises:
            MalformedMessage: naming the invalid part.
        """
        count = count_field(header.fields[0], "N", MAX_SHARDS)
        terms = array_frame(frames[1], "<u8", (count,), "terms")
        return cls(terms, tuple(unpack_names(frames[2], count)))


# ── STEP and STEPPED ──────────────────────────────────────────────────────────────────────────────────────────────────

STEP: Final = int(Kind.STEP)
STEPPED: Final = int(Kind.STEPPED)
DTYPE_F32: Final = 1
"""The only dtype of a STEP."""

MAX_REQUESTS: Final = 128
"""The most requests that one STEPPED answers."""

STEP_HEADER: Final = struct.Struct("<BBHIIIQ")
"""Kind, dtype, reserved (0), T, N, features, request."""

STEPPED_HEADER: Final = struct.Struct("<BBH7I")
"""Kind, reserved (0), M, T, N, queue_us, compute_us, send_us, F, reserved (0)."""

ANSWERED: Final = np.dtype([("request", "<u8"), ("columns", "<u8")])
"""One request that a STEPPED answers, and the number of its columns (16 bytes)."""

_ANSWERED: Final = struct.Struct("<2Q")
_F4: Final = np.dtype("<f4")
_HEADER_BYTES: Final = STEP_HEADER.size
_REQUESTS: Final = 2**63
_MOST_US: Final = 2**32 - 1


class SteppedMessage(NamedTuple):
    """A STEPPED, its sizes checked."""

    answered: list[tuple[int, int]]
    """Request and number of columns, in the order of the columns."""
    times_us: tuple[int, int, int]
    """Queue, compute and send."""
    y: F32
    """float32 [T, N, outputs], read-only, with NaN for frames that were not applied."""
    failures: FailureArray
    """FAILURE [F]."""


def pack_step(request: int, timesteps: int, features: int, columns: Frame) -> bytes:
    """Frame 0 of a STEP with these columns, COLUMN [N]; frame 1 is x, float32 [T, N, features]."""
    width = len(columns) // COLUMN_BYTES
    return STEP_HEADER.pack(STEP, DTYPE_F32, 0, timesteps, width, features, request) + columns


def unpack_step(frames: Sequence[Frame]) -> tuple[int, int, int, int, int]:
    """Check and read frame 0 of a STEP. The caller checks the size of x.

    Returns:
        request, T, N, features and dtype; the columns follow after `STEP_HEADER.size` bytes.

    Raises:
        MalformedMessage: naming the invalid part.
    """
    header = frames[0]
    if len(frames) != 2:
        raise MalformedMessage(f"a STEP message has 2 frames, this one {len(frames)}")
    if len(header) < _HEADER_BYTES:
        raise MalformedMessage(f"a STEP header is {_HEADER_BYTES} bytes, this frame {len(header)}")
    kind, dtype, reserved, timesteps, width, features, request = STEP_HEADER.unpack_from(header)
    if kind != STEP:
        raise MalformedMessage(f"a STEP begins with {STEP}, not {kind}")
    if reserved:
        raise MalformedMessage("the reserved bytes of the header must be 0")
    if request >= _REQUESTS:
        raise MalformedMessage("the request number must be an integer from 0 to 2^63 - 1")
    if not timesteps:
        raise MalformedMessage("T must be at least 1")
    if not 1 <= width <= MAX_BLOCK_STREAMS:
        raise MalformedMessage(f"N must be from 1 to {MAX_BLOCK_STREAMS}")
    columns = len(header) - _HEADER_BYTES
    if columns != COLUMN_BYTES * width:
        raise MalformedMessage(f"columns must be {COLUMN_BYTES * width} bytes for N = {width}, they are {columns}")
    return request, timesteps, width, features, dtype


def request_of_step(header: Frame) -> int:
    """The request number of a STEP that is refused; 0 if it cannot be read."""
    if len(header) < _HEADER_BYTES:
        return 0
    request: int = STEP_HEADER.unpack_from(header)[-1]
    return request if request < _REQUESTS else 0


def pack_stepped(
    answered: bytes, timesteps: int, width: int, times_us: tuple[int, int, int], failures: bytes = b""
) -> bytes:
    """Frame 0 of a STEPPED; frame 1 is y, float32 [T, N, outputs].

    Args:
        answered: ANSWERED [M].
        timesteps: T.
        width: N, the columns of all requests.
        times_us: queue, compute and send, at most 2^32 - 1 each.
        failures: FAILURE [F].
    """
    requests, failed = len(answered) // ANSWERED.itemsize, len(failures) // FAILURE.itemsize
    queue_us, compute_us, send_us = times_us
    if queue_us > _MOST_US or compute_us > _MOST_US or send_us > _MOST_US:
        queue_us, compute_us, send_us = min(queue_us, _MOST_US), min(compute_us, _MOST_US), min(send_us, _MOST_US)
    header = STEPPED_HEADER.pack(STEPPED, 0, requests, timesteps, width, queue_us, compute_us, send_us, failed, 0)
    return header + answered + failures


def unpack_stepped(frames: Sequence[Frame]) -> SteppedMessage:
    """Check and read a STEPPED, except the contents of its failures.

    Raises:
        MalformedMessage: naming the invalid part.
    """
    if len(frames) != 2:
        raise MalformedMessage(f"a STEPPED message has 2 frames, this one {len(frames)}")
    header, floats = frames
    if len(header) < STEPPED_HEADER.size:
        raise MalformedMessage(f"a STEPPED header is {STEPPED_HEADER.size} bytes, this frame {len(header)}")
    kind, first, requests, timesteps, width, queue_us, compute_us, send_us, failed, second = STEPPED_HEADER.unpack_from(
        header
    )
    if kind != STEPPED or first or second:
        raise MalformedMessage(f"a STEPPED begins with {STEPPED}, and its reserved bytes are 0")
    if not 1 <= requests <= MAX_REQUESTS:
        raise MalformedMessage(f"a STEPPED answers 1 to {MAX_REQUESTS} requests, not {requests}")
    failures_at = STEPPED_HEADER.size + requests * ANSWERED.itemsize
    if len(header) != failures_at + failed * FAILURE.itemsize:
        raise MalformedMessage("the first frame has another number of bytes than its header says")
    answered = list(_ANSWERED.iter_unpack(header[STEPPED_HEADER.size : failures_at]))
    widths = [columns for _, columns in answered]
    if not timesteps or 0 in widths or sum(widths) != width:
        raise MalformedMessage("T and each request's columns must be at least 1, and N the sum of the columns")
    outputs, rest = divmod(len(floats), 4 * timesteps * width)
    if rest or not outputs:
        raise MalformedMessage("y has another number of bytes than the header says")
    y = np.frombuffer(floats, _F4).reshape(timesteps, width, outputs)
    failures: FailureArray = np.frombuffer(header, FAILURE, failed, failures_at) if failed else NO_FAILURES
    return SteppedMessage(answered, (queue_us, compute_us, send_us), y, failures)


# ── Messages through a socket, without waiting ────────────────────────────────────────────────────────────────────────

# pyzmq's flags are enum.IntFlag: combining two takes several times as long as sending a frame does. (Measured with
# pyzmq 27.3, Python 3.11: 43 µs for send_multipart of three frames with zmq.NOBLOCK, 6 µs with plain numbers.)
NOW: Final = int(zmq.NOBLOCK)
_NOW_AND_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
READABLE: Final = int(zmq.POLLIN)
READABLE_OR_WRITABLE: Final = int(zmq.POLLIN | zmq.POLLOUT)


def send_now(socket: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> None:
    """Hand a message to ZeroMQ.

    Raises:
        zmq.Again: when there is no room for the message now.
        zmq.ZMQError: for any other error; nothing of the message was taken.
    """
    send = socket.send
    for frame in frames[:-1]:
        send(frame, _NOW_AND_MORE)
    send(frames[-1], NOW)


def receive_now(socket: zmq.Socket[bytes]) -> list[bytes | memoryview]:
    """Return the frames of the next message, with only the header copied, or none if there is no message.

    `Socket.recv_multipart` queries RCVMORE after each frame, which costs more than receiving it; a `Frame` already
    knows. (Reading an empty socket raises, which costs three times as much as asking.)
    """
    recv = socket.recv
    try:
        frame = recv(NOW, False)
    except zmq.Again:
        return []
    frames: list[bytes | memoryview] = [frame.bytes]
    while frame.more:
        frame = recv(NOW, False)
        frames.append(frame.buffer)
    return frames


def skip_parts(socket: zmq.Socket[bytes], at_most: int) -> bool:
    """Discard up to `at_most` parts of a message; return whether none is left."""
    return any(not socket.recv(NOW, False).more for _ in range(at_most))


def ready(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received now; if not, the socket will signal one.

    (1.8 µs; to get the socket's option EVENTS takes 2.8, because pyzmq makes an `enum.IntEnum` of its number.)
    """
    return bool(zmq.zmq_poll([(socket, READABLE)], 0))
