"""Who may connect: the name, role and quotas of each key, read from `transport.peers_file`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from instep.config.loading import RepeatedKey, UniqueKeyLoader
from instep.config.sections import Section
from instep.models.errors import in_line
from instep_client.key_files import is_key, read_text
from instep_client.protocol.errors import InvalidInput

DEFAULT: Final = "default"
"""The entry whose quotas hold for everybody who has none of their own."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


_FIELD: Final = re.compile(r"[a-z_]{1,20}|[0-9]{1,5}")
_WORDS: Final = {
    "extra_forbidden": "there is no such field",
    "invalid_key": "there is no such field",
    "missing": "it is missing",
    "frozen_set_type": "expected a list of names",
    "tuple_type": "expected a pattern, or a list of them",
    "model_type": "expected {FIELD: VALUE}",
}
"""Sentences in place of those of pydantic, by its types of errors."""


class KeysError(Exception):
    """`transport.key_file` or `transport.peers_file` cannot be used.

    Attributes:
        problems: a sentence for each problem; none quotes a file's content.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def _several(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Role(StrEnum):
    """What a principal is for."""

    PRODUCER = "producer"
    READER = "reader"
    OPERATOR = "operator"
    NODE = "node"
    """A machine of a cluster, and nothing else: it speaks to the directory and to other nodes, not to servers."""


class Quotas(Section):
    """What a principal may take of the server; None is no bound of its own."""

    connections: Annotated[int, Field(ge=1, strict=True)] | None = None
    streams: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Open streams, parked and hibernating ones included."""
    frames_per_s: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    unread_bytes: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Everything that the server keeps for the principal until it is read."""


def _checked_key(key: str) -> str:
    if not is_key(key):
        raise ValueError("expected a public key, 40 characters in quotes, as `instep keys show FILE` prints it")
    return key


class _Default(Section):
    quotas: Quotas = Quotas()


class Principal(Section):
    """One who connects: a name, from HELLO to the end of a connection."""

    name: str
    key: Annotated[str, AfterValidator(_checked_key)]
    """The public key, in Z85."""
    role: Role
    streams: Annotated[tuple[str, ...], BeforeValidator(_several)] = ("*",)
    """Patterns of the names of streams, as `fnmatch` reads them."""
    models: frozenset[str] | None = None
    """The models that it may use; None for all."""
    quotas: Quotas = Quotas()

    def has_rights_of(self, other: Principal | None) -> bool:
        """Whether both may do the same under the same name."""
        return other is not None and other.model_copy(update={"quotas": self.quotas}) == self


LOCAL: Final = Principal.model_construct(
    name="local", key="", role=Role.OPERATOR, streams=("*",), models=None, quotas=Quotas()
)
"""Everybody, where there are no keys."""


@dataclass(frozen=True, slots=True)
class Principals:
    """All who may connect; a reload makes other ones."""

    by_key: Mapping[str, Principal]
    by_name: Mapping[str, Principal]

    @classmethod
    def read(cls, path: Path) -> Principals:
        """Read `NAME: {key: …, role: …, streams: …, models: …, quotas: {…}}` of each, and `default: {quotas: {…}}`.

        Nobody may connect where the file is empty.

        Raises:
            KeysError: with every problem.
        """
        try:
            text, status = read_text(path)
            if status.st_mode & 0o022:
                raise InvalidInput(f"other users can change {path}: chmod go-w {path}")
            entries = UniqueKeyLoader(text).get_single_data()
        except InvalidInput as error:
            raise KeysError([f"transport.peers_file: {error}"]) from None
        except RepeatedKey as error:
            place = f"{_quoted(error.key, NAME)} is there twice (line {error.line})"
            raise KeysError([f"transport.peers_file {path}: {place}"]) from None
        except Exception as error:  # also PyYAML's KeyErrors and AttributeErrors, and nesting that is too deep
            raise KeysError([f"transport.peers_file {path} is not YAML{in_line(error)}"]) from None
        if entries is None:
            entries = {}
        if not isinstance(entries, dict) or not all(isinstance(each, dict) for each in entries.values()):
            sentence = "expected a line NAME: {key: …, role: …} for each peer"
            raise KeysError([f"transport.peers_file {path}: {sentence}"])
        problems: list[str] = []
        found = _parse(entries, problems)
        by_key = {each.key: each for each in found}
        others = [(each.name, by_key[each.key].name) for each in found if by_key[each.key] is not each]
        problems += [f"{one} and {other} have the same key" for one, other in others]
        if problems:
            raise KeysError(f"transport.peers_file {path}: {problem}" for problem in problems)
        return cls(by_key, {each.name: each for each in found})


class _PeersFile(Section):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Principal]
    default: _Default


def _parse(entries: dict[Any, dict[str, Any]], problems: list[str]) -> list[Principal]:
    shared = entries.pop(DEFAULT, {})
    if not all(isinstance(name, str) and NAME.fullmatch(name) for name in entries):
        problems.append(
            "a name has 1 to 64 letters, digits, dots, hyphens and underscores, in quotes if it has only digits"
        )
        return []
    problems += [f"{name}.name: {_WORDS['extra_forbidden']}" for name, entry in entries.items() if "name" in entry]
    named = {name: {**entry, "name": name} for name, entry in entries.items()}
    try:
        file = _PeersFile.model_validate({DEFAULT: shared, **named})
    except ValidationError as error:
        problems += map(_line, error.errors(include_url=False, include_input=False))
        return []
    quotas, extra = file.default.quotas.model_dump(), file.__pydantic_extra__
    return [
        each.model_copy(update={"quotas": Quotas(**quotas | each.quotas.model_dump(exclude_unset=True))})
        for each in extra.values()
    ]


def _line(found: ErrorDetails) -> str:
    message = _WORDS.get(found["type"], found["msg"]).removeprefix("Value error, ")
    name, *fields = map(str, found["loc"])
    return f"{'.'.join([name, *(_quoted(each, _FIELD) for each in fields)])}: {message}"


def _quoted(text: str, expected: re.Pattern[str]) -> str:
    """A name of the file, unless it could be a key in the wrong place."""
    return text if expected.fullmatch(text) else "…"
