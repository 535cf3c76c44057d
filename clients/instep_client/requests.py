"""Calls about streams that are asked in as many messages as it takes, one for each part of the streams.

Request
├── OpenCall                 gives a stream handle: all its streams are opened or none
│   ├── ResumeCall           … resumed
│   └── ForkCall             … opened as copies of another handle's
├── ReadStateCall            reads states: a handle's, or anybody's by name
├── ResetCall                gives a handle's streams other states
└── CloseCall                closes a stream handle
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from instep_client.calls import Call
from instep_client.protocol.errors import InstepError
from instep_client.protocol.state_spec import U8, StateSpec
from instep_client.protocol.wire import GRANT, U64, Code, FailureArray, GrantArray
from instep_client.streams import StreamHandle

R = TypeVar("R")


class RefusedStream(NamedTuple):
    """Which stream of a call was refused, and why."""

    which: int
    code: Code
    sentence: str
    expected_seq: int


class Request(Call[R]):
    """A call that ends when every part of it was answered."""

    __slots__ = ("again", "parts_left", "refusal")

    def __init__(self) -> None:
        super().__init__()
        self.parts_left = 0
        self.refusal: RefusedStream | None = None
        """The first refused stream."""
        self.again = False
        """Whether it was asked before over a connection that was lost, and may have been done then."""

    def begin(self, parts: int) -> None:
        """It is asked in so many parts; what was answered before is forgotten."""
        self.parts_left = parts
        self.refusal = None

    def note(self, index: int, code: Code, sentence: str, expected_seq: int = 0) -> None:
        """A stream was refused."""
        if self.refusal is None or index < self.refusal.which:
            self.refusal = RefusedStream(index, code, sentence, expected_seq)

    def part_answered(self) -> bool:
        """A part was answered; whether that was the last."""
        self.parts_left -= 1
        return self.parts_left == 0


class OpenCall(Request[StreamHandle]):
    """The opening of one or many streams; the result is their stream handle. All are opened or none."""

    __slots__ = ("abandoned", "first_seqs", "grants", "initial", "names", "single")

    def __init__(
        self, names: Sequence[str], single: bool, initial: U8 | None = None, first_seqs: U64 | None = None
    ) -> None:
        super().__init__()
        self.names = names
        self.single = single
        self.initial = initial
        """Rows of bytes [N, row_bytes]; None for the initial state."""
        self.first_seqs = first_seqs
        """uint64 [N]; None for 0."""
        self.grants: GrantArray = np.zeros(len(names), GRANT)
        self.abandoned = False
        """Whether nobody waits any more: what was opened is to be closed again."""


class ResumeCall(OpenCall):
    """The resuming of streams by name."""

    __slots__ = ("claims", "take_over")

    def __init__(self, names: Sequence[str], single: bool, claims: FailureArray, take_over: bool) -> None:
        super().__init__(names, single)
        self.claims = claims
        """`wire.CLAIM` [N]."""
        self.take_over = take_over


class ForkCall(OpenCall):
    """The copying of a handle's streams to new ones."""

    __slots__ = ("handle",)

    def __init__(self, names: Sequence[str], handle: StreamHandle) -> None:
        super().__init__(names, handle.single)
        self.handle = handle
        """The handle whose streams are copied."""


class ReadStateCall(Request[tuple[U64, U8]]):
    """A read of states; the result is the next seqs uint64 [N] and rows of states [N, row_bytes]."""

    __slots__ = ("handle", "names", "seqs", "states")

    def __init__(self, names: Sequence[str], handle: StreamHandle | None, states: U8) -> None:
        super().__init__()
        self.names = names
        self.handle = handle
        """The streams are given by its handles; by name where None, whoever owns them."""
        self.seqs: U64 = np.zeros(len(names), np.uint64)
        self.states = states
        """Rows of bytes [N, row_bytes], to be filled."""


class ResetCall(Request[None]):
    """Other states for a handle's streams."""

    __slots__ = ("handle", "states")

    def __init__(self, handle: StreamHandle, states: U8 | None) -> None:
        super().__init__()
        self.handle = handle
        self.states = states
        """Rows of bytes [N, row_bytes]; None for the initial state."""


class CloseCall(Request[U8]):
    """The closing of a handle; the result is final states [N, row_bytes], `missing` where streams had ended."""

    __slots__ = ("_on_end", "finals", "handle")

    def __init__(self, handle: StreamHandle, state: StateSpec, on_end: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.handle = handle
        self.finals: U8 = state.missing(len(handle.rows))
        self._on_end = on_end

    def finish(self, result: U8) -> None:
        """End it with the final states."""
        super().finish(result)
        self._tell()

    def fail(self, error: InstepError) -> None:
        """End it with an error."""
        super().fail(error)
        self._tell()

    def _tell(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()


QueuedCall: TypeAlias = ForkCall | ResetCall | CloseCall
"""Requests that wait until everything sent through their stream handle was answered, and come before anything later."""
