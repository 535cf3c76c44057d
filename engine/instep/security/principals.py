"""Who may connect: the name, role and quotas of each key, read from `transport.peers_file`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from instep.config.loading import UniqueKeyLoader
from instep.config.sections import Section
from instep.models.errors import in_line
from instep_client.key_files import is_key, read_text
from instep_client.protocol.errors import InvalidInput

DEFAULT: Final = "default"
"""The entry whose quotas hold for everybody who has none of their own."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_FIELD: Final = re.compile(r"[a-z_]{1,20}|[0-9]{1,5}")
_NAMES: Final = "a name has 1 to 64 letters, digits, dots, hyphens and underscores, in quotes if it has only digits"
_EMPTY: Final = "it would allow nothing: name a pattern, or leave the key out to allow everything"
_SENTENCES: Final = {
    "invalid_key": _NAMES,
    "string_pattern_mismatch": _NAMES,
    "too_short": _EMPTY,
    "string_too_short": _EMPTY,
    "model_type": "expected NAME: {key: …, role: …} for each peer",
}
"""Sentences in place of those of pydantic, by its types of errors."""


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
        raise ValueError("expected a public key, 40 characters in quotes, as `instep keys new NAME` prints it")
    return key


class _Default(Section):
    quotas: Quotas = Quotas()


_Named = Annotated[str, Field(min_length=1)]


class _Rights(_Default):
    key: Annotated[str, AfterValidator(_checked_key)]
    """The public key, in Z85."""
    role: Role
    streams: Annotated[tuple[_Named, ...], Field(min_length=1), BeforeValidator(_several)] = ("*",)
    """Patterns of the names of streams, as `fnmatch` reads them."""
    models: Annotated[frozenset[_Named], Field(min_length=1)] | None = None
    """The models that it may use; None for all."""


class Principal(_Rights):
    """One who connects: a name, from HELLO to the end of a connection."""

    name: str

    def has_rights_of(self, other: Principal | None) -> bool:
        """Whether both may do the same under the same name."""
        return other is not None and other.model_copy(update={"quotas": self.quotas}) == self


LOCAL: Final = Principal.model_construct(name="local", key="", role=Role.OPERATOR)
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
            InvalidInput: with a line for each problem; none quotes the file's content.
        """
        try:
            text, status = read_text(path)
            if status.st_mode & 0o022:
                raise InvalidInput(f"other users can change {path}: chmod go-w {path}")
            entries = UniqueKeyLoader(text).get_single_data()
            found = _PeersFile.model_validate({} if entries is None else entries).principals()
            by_key = {each.key: each for each in found}
            others = ((each.name, by_key[each.key].name) for each in found)
            problems = [f"{one} and {other} have the same key" for one, other in others if one != other]
        except InvalidInput as error:
            problems = [str(error)]
        except ValidationError as error:
            problems = [_line(each) for each in error.errors(include_url=False, include_input=False)]
        except Exception as error:  # also PyYAML's KeyErrors and AttributeErrors, and nesting that is too deep
            problems = [f"{path} is not YAML, or has a name twice{in_line(error)}"]
        if problems:
            raise InvalidInput("\n".join(f"transport.peers_file: {problem}" for problem in problems))
        return cls(by_key, {each.name: each for each in found})


class _PeersFile(Section):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=rf"^{NAME.pattern}$")], _Rights]
    default: _Default = _Default()

    def principals(self) -> list[Principal]:
        of_all = self.default.quotas
        return [
            Principal(
                name=name,
                **dict(each) | {"quotas": of_all.model_copy(update=each.quotas.model_dump(exclude_unset=True))},
            )
            for name, each in self.__pydantic_extra__.items()
        ]


def _line(found: ErrorDetails) -> str:
    name, *fields = map(str, found["loc"] or ("…",))
    path = ".".join([_quoted(name, NAME), *(_quoted(each, _FIELD) for each in fields)])
    return f"{path}: {_SENTENCES.get(found['type'], found['msg']).removeprefix('Value error, ')}"


def _quoted(text: str, expected: re.Pattern[str]) -> str:
    """A name of the file, unless it could be a key in the wrong place."""
    return text if expected.fullmatch(text) else "…"
