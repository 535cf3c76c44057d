"""The view that the user has chosen with keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from instep_tools.top.snapshot import SORTS, STATES, StreamQuery

KEYS: Final = (
    ("s, S", "sort by the next column, the one before"),
    ("1 … 5", "sort by " + ", ".join(SORTS) + "; again to reverse"),
    ("/", "only streams with this in their names; Enter ends, Esc clears"),
    ("f", "only streams of one state: connected, parked, hibernating, or all"),
    ("m, M", "the next model, the one before"),
    ("p", "pause, and continue"),
    ("?", "this help, and back"),
    ("q, Ctrl-C", "quit"),
)

_ENTER, _ESCAPE, _BACKSPACE, _CLEAR = "\r\n", "\x1b", "\x7f\x08", "\x15"

_OTHER_KEYS: Final = re.compile(r"\x1b[\[O][\d;]*[^\d;]")
"""Sequences that arrows and other keys without a meaning here send."""


class ScreenView:
    """Everything that keys change."""

    def __init__(self, query: StreamQuery) -> None:
        self.query = query
        self.models: Sequence[str] = ()
        """The names that `m` goes through."""
        self.model = ""
        """The one that is shown."""
        self.typing = False
        """Whether keys go into the filter."""
        self.paused = self.helping = self.done = False
        self._actions: dict[str, Callable[[], None]] = {
            "s": lambda: self._sort_by(SORTS[(SORTS.index(self.query.sort) + 1) % len(SORTS)]),
            "S": lambda: self._sort_by(SORTS[SORTS.index(self.query.sort) - 1]),
            **{str(number): partial(self._sort_by, sort) for number, sort in enumerate(SORTS, 1)},
            "/": partial(self._toggle, "typing"),
            "f": self._next_state,
            "m": partial(self._next_model, 1),
            "M": partial(self._next_model, -1),
            "p": partial(self._toggle, "paused"),
            "?": partial(self._toggle, "helping"),
            "q": self._quit,
        }

    def press(self, text: str) -> bool:
        """Take what was typed, or pasted; whether another question to the server follows from it."""
        before = self.query
        for key in _OTHER_KEYS.sub("", text):
            if self.typing:
                self._type(key)
            elif key in self._actions:
                self._actions[key]()
            elif key == _ESCAPE:
                self.helping, self.query = False, self.query._replace(contains="")
        return self.query != before

    def _type(self, key: str) -> None:
        contains = self.query.contains
        if key in _ENTER:
            self.typing = False
        elif key == _ESCAPE:
            self.typing, contains = False, ""
        elif key in _BACKSPACE:
            contains = contains[:-1]
        elif key == _CLEAR:
            contains = ""
        elif key.isprintable():
            contains += key
        self.query = self.query._replace(contains=contains)

    def _toggle(self, name: str) -> None:
        setattr(self, name, not getattr(self, name))

    def _quit(self) -> None:
        self.done = True

    def _sort_by(self, sort: str) -> None:
        self.query = self.query._replace(sort=sort, reverse=sort == self.query.sort and not self.query.reverse)

    def _next_state(self) -> None:
        states = ("", *STATES)
        self.query = self.query._replace(state=states[(states.index(self.query.state) + 1) % len(states)])

    def _next_model(self, step: int) -> None:
        if len(self.models) > 1:
            at = self.models.index(self.model) if self.model in self.models else 0
            self.model = self.models[(at + step) % len(self.models)]
            self.query = self.query._replace(model=self.model)
