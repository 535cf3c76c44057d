"""Which states the recording holds as they are: a snapshot need not write them, and memory need not hold them."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64, U8, Bool

_KEPT: Final = 0
_IN_SNAPSHOT: Final = 1
_CHANGED: Final = 2

Kind: TypeAlias = Literal["step", "request"]
"""What changes states: steps, and changes that a client asked for."""


class Keeping:
    """For each slot, how the state of its stream stands to the recording.

    It is kept (a committed row holds it), in a snapshot that is not committed yet, or changed since. A slot without a
    stream counts as kept: nothing of it has to be.

    `changed` comes before the change, so whoever sees a state that counts as kept may drop it: should it change a
    moment later, the change begins with fetching it.

    Args:
        max_streams: slots run from 1 to this.
        max_changed: how many states may be not kept at once, as many as host memory holds; None for any number.
    """

    def __init__(self, max_streams: int, max_changed: int | None = None) -> None:
        self.max_changed = max_changed
        self.changed_count = 0
        """States that are not kept."""
        self._waited_in_vain = False
        self._waiting: list[Kind] = []
        """Who was told that there is no room, in that order."""
        self._standing: U8 = np.zeros(max_streams + 1, np.uint8)

    def is_kept(self, slots: I64) -> Bool:
        """Whether the recording holds the states as they are: int64 [N] → bool [N]."""
        kept: Bool = self._standing[slots] == _KEPT
        return kept

    @property
    def is_pressed(self) -> bool:
        """Whether half of what may be changed at once is: a snapshot now comes before anybody has to wait for it."""
        return self.max_changed is not None and 2 * self.changed_count > self.max_changed

    def has_room(self, count: int) -> bool:
        """Whether so many more states may change now.

        Once after a snapshot that somebody waited for and that failed they may: what has no room then fails by itself,
        rather than wait for ever.
        """
        free = self.max_changed is None or self.changed_count + count <= self.max_changed
        return free or self._waited_in_vain

    def may_begin(self, kind: Kind, count: int) -> bool:
        """Whether a change of so many more states begins now; whoever is told so begins it.

        Who is refused has the next turn: until then the other kind begins nothing, though there may be room for it. So
        neither, however much of it comes, leaves the other without room for ever. What was refused
        asks again, after each snapshot and whenever the other kind has begun something, until it begins.
        """
        if self._waiting[:1] in ([], [kind]) and self.has_room(count):
            self._waiting = self._waiting[1:]
            return True
        if kind not in self._waiting:
            self._waiting.append(kind)
        return False

    def changed(self, slots: I64) -> None:
        """The states are about to change: int64 [N], distinct."""
        self.changed_count += int(np.count_nonzero(self.is_kept(slots)))
        self._standing[slots] = _CHANGED
        self._waited_in_vain = False

    def kept(self, slots: I64) -> None:
        """The recording holds the states as they are, or never needs to: int64 [N], distinct."""
        self.changed_count -= len(slots) - int(np.count_nonzero(self.is_kept(slots)))
        self._standing[slots] = _KEPT

    def take(self) -> I64:
        """Slots whose states a snapshot has to hold that begins now: int64 [N]. One snapshot at a time."""
        slots = np.flatnonzero(self._standing == _CHANGED)
        self._standing[slots] = _IN_SNAPSHOT
        return slots

    def committed(self, slots: I64) -> None:
        """The snapshot of these slots, int64 [N], is in the recording; those that changed meanwhile are not kept."""
        self.kept(slots[self._standing[slots] == _IN_SNAPSHOT])

    def failed(self, slots: I64, *, is_awaited: bool) -> None:
        """The snapshot of these slots, int64 [N], will not be in the recording; somebody may have waited for it."""
        self._standing[slots[self._standing[slots] == _IN_SNAPSHOT]] = _CHANGED
        self._waited_in_vain = is_awaited
