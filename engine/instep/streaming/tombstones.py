"""Names of streams that expired, so that whoever asks for them later is told so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_MOST: Final = 65_536


class Tombstones:
    """The newest names; older ones are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        """Streams of these names have expired."""
        for name in names:
            self._names.pop(name, None)
            self._names[name] = None
        while len(self._names) > _MOST:
            del self._names[next(iter(self._names))]

    def remove(self, names: Iterable[str]) -> None:
        """There are streams of these names again."""
        for name in names:
            self._names.pop(name, None)
