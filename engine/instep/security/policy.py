"""Who may do what: the one table of it, and the questions that front ends ask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto
from fnmatch import translate
from functools import lru_cache
from typing import Final

from instep.security.principals import Principal, Role


class Verb(Enum):
    """What is asked for. STEP is not among them: only the connection that owns a stream has its handle."""

    HELLO = auto()
    """A connection to a model; the name is that of the model. All others are about names of streams."""
    OPEN = auto()
    """OPEN, and the copies of FORK."""
    RESUME = auto()
    """RESUME, also to take over from another connection."""
    READ_STATE = auto()
    """READ_STATE by name."""
    USE = auto()
    """RESET, CLOSE, FORK and READ_STATE by handle, of one's own streams."""
    LIST = auto()
    """LIST, MODELS and STATS."""
    REMOVE = auto()
    """To close or park the streams of others."""
    MANAGE = auto()
    """To ask the directory of a cluster for its status, and to move shards."""
    TAKE_PART = auto()
    """To be a node of a cluster: to serve shards and to send copies."""


_ALL: Final = frozenset(Role) - {Role.NODE}
_OWNERS: Final = frozenset({Role.PRODUCER, Role.OPERATOR})
_ROLES: Final = {
    Verb.HELLO: _ALL,
    Verb.OPEN: _OWNERS,
    Verb.RESUME: _OWNERS,
    Verb.READ_STATE: _ALL,
    Verb.USE: _OWNERS,
    Verb.LIST: _ALL,
    Verb.REMOVE: frozenset({Role.OPERATOR}),
    Verb.MANAGE: frozenset({Role.OPERATOR}),
    Verb.TAKE_PART: frozenset({Role.NODE}),
}


def allowed(principal: Principal, verb: Verb, *names: str) -> bool:
    """Whether a principal may do this with all of these names; without any, whether its role may do it at all."""
    if principal.role not in _ROLES[verb]:
        return False
    if verb is Verb.HELLO:
        return principal.models is None or principal.models.issuperset(names)
    patterns = principal.streams
    return "*" in patterns or all(map(_compiled(patterns).match, names))


@lru_cache(4096)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)")  # an empty expression would match every name


def allowed_to_see(principal: Principal, name: str) -> bool:
    """Whether a principal may know what the one of that name uses; a producer sees itself alone."""
    return principal.name == name or principal.role is not Role.PRODUCER


def looked_up(principal: Principal, verb: Verb, names: Sequence[str]) -> list[str]:
    """The names under which streams are looked up for a principal.

    One that it may not use becomes one that no stream can have. So it fails as a name that does not exist, and the
    answer takes the same way and time.
    """
    return [name if allowed(principal, verb, name) else f"\n{name}" for name in names]
