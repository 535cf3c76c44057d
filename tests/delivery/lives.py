"""Streams as the truth knows them, and as their clients do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from instep_client.protocol.wire import Kind
from tests.delivery.recurrence import recur


class Violation(AssertionError):
    """A rule of delivery was broken."""


def require(holds: object, what: str) -> None:
    """Raise a Violation unless it holds."""
    if not holds:
        raise Violation(what)


class Line:
    """Frames in order, the output of each, and the state before each.

    Args:
        first: the seq of the first frame. A copy begins where its original is; all before is 0.
        start: the state before it.
    """

    def __init__(self, first: int = 0, start: int = 0) -> None:
        self.first, self._start = first, start
        self.fill([], {})

    def __len__(self) -> int:
        return len(self.xs)

    def append(self, x: int) -> None:
        self.xs.append(x)
        self.outputs.append(recur(self.states[-1], x))
        self.states.append(self.resets.get(len(self), self.outputs[-1]))

    def fill(self, xs: Iterable[int], resets: dict[int, int]) -> None:
        """Begin again with other frames, and other states that are set before the frames of those seqs."""
        self.resets = resets
        self.xs, self.outputs = [0] * self.first, [0] * self.first
        self.states = [*self.xs, resets.get(self.first, self._start)]
        for x in xs:
            self.append(x)

    def reset(self, seq: int, state: int) -> None:
        self.fill(self.xs[self.first :], {**self.resets, seq: state})

    def cut(self, length: int) -> Line:
        line = Line(self.first, self._start)
        line.fill(self.xs[self.first : length], {seq: state for seq, state in self.resets.items() if seq <= length})
        return line


@dataclass
class Life:
    """One opening of a stream."""

    number: int
    name: str
    line: Line
    """Of the newest grant that left the server."""
    holder: int
    """The client that got it."""
    epoch: int = 0
    lines: dict[int, Line] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    """States that RESETs have set."""
    given: dict[int, int] = field(default_factory=dict)
    """Outputs that have left the server and were not declared lost, by seq."""
    acked: int = 0
    """What the client that sends has acknowledged."""
    claimed: int = 0
    """What clients that asked for the stream said they have."""
    is_contended: bool = False
    """Another client has asked for it, or a message of a connection that was left behind has."""
    has_ended: bool = False
    """Somebody closed it, or it expired, or its state was lost."""
    has_slept: bool = False
    """It was out of memory: handles of before are unknown."""


@dataclass(frozen=True)
class Asked:
    """A request of a client: what it says, one entry a stream."""

    kind: Kind
    names: list[str]
    lives: list[Life] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    first_seqs: list[int] = field(default_factory=list)
    acked: list[int] = field(default_factory=list)
    timesteps: int = 0
    have: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    takes_over: bool = False
    is_conflict: bool = False
    """It repeats an answered frame with another value: no output may come."""


class Is(Enum):
    """What a lane is to its client."""

    NOTHING = auto()
    OPENING = auto()
    FORKING = auto()
    OPEN = auto()
    RESUMING = auto()
    TAKING = auto()
    CLOSING = auto()
    REFUSED = auto()
    """In use, fenced, behind, or set back: somebody must decide."""


@dataclass
class Lane:
    """A stream as its client knows it."""

    name: str
    state: Is = Is.NOTHING
    request: int = 0
    handle: int = 0
    epoch: int = 0
    life: Life | None = None
    line: Line = field(default_factory=Line)
    """What it has sent or will send."""
    have: int = 0
    """Outputs it has, without a gap."""
    later: set[int] = field(default_factory=set)
    """Seqs of outputs that came after a gap."""
    cursor: int = 0
    """What it sends next."""
    was_set_back: bool = False
    """It was told that given outputs are lost."""
    new_state: int | None = None
    """What a RESET sets that is not answered."""
    is_waking: bool = False
    """It was told that the stream hibernates, and not yet its new handle."""

    @property
    def is_answered(self) -> bool:
        return self.have == len(self.line)

    @property
    def waits(self) -> bool:
        """Whether a request is not answered."""
        is_asked = self.new_state is not None or self.is_waking
        return is_asked or self.state not in (Is.NOTHING, Is.OPEN, Is.REFUSED)
