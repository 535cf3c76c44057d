"""Every exception of the client, and what to do about each.

    InstepError
    ├── MalformedMessage          bytes that do not follow the protocol (a bug in one of the two sides)
    ├── ConnectionFailed          nobody answers at the endpoint, or the server went away or was restarted
    │   ├── ConnectionRefused     nothing listens at the endpoint
    │   └── HandshakeFailed       the server and the client do not agree on keys
    ├── StepTimeout               no answer came within the `timeout_s` of a call; `sent` says what became of its frames
    ├── ClientClosed              the client, stream or group was used after it was closed
    ├── InvalidInput              an argument of the wrong shape or kind; nothing was sent
    └── Refused                   the server answered with a code; `code` and `sentence` say why
        ├── StreamRefused         opening, resuming, changing or closing a stream was refused
        ├── FramesRefused         frames of a step were not applied; `failures` says which, `outputs` holds the rest
        └── StreamEvicted         the stream has ended here: idle, expired, taken over, or its state was lost
            └── DataLoss          the server does not hold what this client was given, or not what it still misses

A connection that is lost is made anew without any of these, for as long as the client's `reconnect_s` says; what is
raised then is what a person must decide. Every message is a sentence that says whose fault it is and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from instep_client.protocol.codes import Code


class InstepError(Exception):
    """The root of the tree."""


class MalformedMessage(InstepError):
    """Bytes that do not follow the protocol."""


class ConnectionFailed(InstepError, ConnectionError):
    """Nobody answers at the endpoint, or the server went away or was restarted."""


class ConnectionRefused(ConnectionFailed, ConnectionRefusedError):
    """Nothing listens at the endpoint: the port is closed, or the socket's file is missing."""


class HandshakeFailed(ConnectionFailed):
    """The server wants a key, or does not know the client's, or is not the one whose key the client has."""


class StepTimeout(InstepError, TimeoutError):
    """No answer came within the `timeout_s` of a call. The stream goes on; `next_seq` is the seq of its next frame.

    Attributes:
        sent: whether frames were sent. Then they are applied, `next_seq` counts them, and their outputs are lost;
            frames of the same call that were not sent yet never are. Should the server refuse them, `next_seq` goes
            back. Otherwise nothing has changed.
    """

    def __init__(self, timeout_s: float, sent: bool) -> None:
        end = "its frames were sent, and their outputs will be dropped" if sent else "nothing was sent"
        super().__init__(f"no answer within {timeout_s:g} s: {end}; the stream continues with its next_seq")
        self.timeout_s = timeout_s
        self.sent = sent


class ClientClosed(InstepError):
    """The client, stream or group was used after it was closed."""


class InvalidInput(InstepError, ValueError):
    """An argument of the wrong shape or kind; nothing was sent."""


class Refused(InstepError):
    """The server answered with a code.

    Attributes:
        code: the reason as a `wire.Code`.
        sentence: the reason and the cure. The exception's message also names the stream.
    """

    def __init__(self, code: Code, sentence: str, where: str = "") -> None:
        super().__init__(f"{code.name}: {sentence}{where}")
        self.code = code
        self.sentence = sentence


class StreamRefused(Refused):
    """Opening, resuming, changing or closing a stream was refused; `stream` is its name."""

    def __init__(self, code: Code, sentence: str, stream: str) -> None:
        super().__init__(code, sentence, f" (stream {stream!r})")
        self.stream = stream


@dataclass(frozen=True, slots=True)
class FrameFailure:
    """Frames from `seq` on of one stream that a step did not apply."""

    stream: str
    seq: int
    """The first frame that was not applied."""
    code: Code
    expected_seq: int
    """The seq that the stream expects next."""


class FramesRefused(Refused):
    """Some frames of a step were not applied; the others were.

    Attributes:
        failures: one entry for each stream that failed.
        outputs: the answer in its usual shape, NaN where a frame was refused.
    """

    def __init__(
        self, code: Code, sentence: str, failures: tuple[FrameFailure, ...], outputs: npt.NDArray[np.float32]
    ) -> None:
        first = failures[0]
        more = f", and {len(failures) - 1} more streams" if len(failures) > 1 else ""
        super().__init__(
            code,
            sentence,
            f" (stream {first.stream!r}, seq {first.seq}, expected {first.expected_seq}{more})",
        )
        self.failures = failures
        self.outputs = outputs


class StreamEvicted(Refused):
    """The stream has ended here: it was idle, parked for too long, taken over, or its state was lost.

    Attributes:
        stream: its name, or that of the first stream of a group that has ended.
        failures: of a step that was sent, one entry for each stream that failed; empty when nothing was sent.
        outputs: as in `FramesRefused`; None when nothing was sent.
    """

    failures: tuple[FrameFailure, ...] = ()
    outputs: npt.NDArray[np.float32] | None = None

    def __init__(self, code: Code, sentence: str, stream: str) -> None:
        super().__init__(code, sentence, f" (stream {stream!r})")
        self.stream = stream


class DataLoss(StreamEvicted):
    """The server has lost frames of the stream, or no longer has outputs that the client asks for.

    Resume it with `take_over` to continue from the server's seq.

    Attributes:
        have: the client was given the outputs of all seqs below this one.
        server_has: the server has applied the frames of all seqs below this one. If it is less than `have`, frames were
            lost; otherwise outputs from `have` on are no longer kept.
    """

    def __init__(self, code: Code, sentence: str, stream: str, have: int, server_has: int) -> None:
        super().__init__(code, f"{sentence}; the client has {have}, the server {server_has}", stream)
        self.have = have
        self.server_has = server_has


def stream_ended(code: Code, sentence: str, stream: str, have: int, server_has: int) -> StreamEvicted:
    """Make the exception for a stream that has ended."""
    if code.name in ("DATA_LOSS", "OUTPUTS_GONE"):
        return DataLoss(code, sentence, stream, have, server_has)
    return StreamEvicted(code, sentence, stream)
