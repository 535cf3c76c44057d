"""Who may connect: the name, role and quotas of each key, read from `transport.peers_file`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from instep.config.loading import UniqueKeyLoader
from instep.config.sections import Section
from instep_client.key_files import BadKeyFile, is_key, read_text

DEFAULT: Final = "default"
"""The entry whose quotas hold for everybody who has none of their own."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeysError(Exception):
    """`transport.key_file` or `transport.peers_file` cannot be used.

    Attributes:
        problems: a sentence for each problem; none quotes a file's content.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Role(StrEnum):
    """What a principal is for."""

    PRODUCER = "producer"
    READER = "reader"
    OPERATOR = "operator"


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


class Principal(Section):
    """One who connects: a name, from HELLO to the end of a connection."""

    name: str
    key: Annotated[str, AfterValidator(_checked_key)]
    """The public key, in Z85."""
    role: Role
    streams: Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = (
        "*",
    )
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

        Raises:
            KeysError: with every problem.
        """
        try:
            entries = UniqueKeyLoader(read_text(path, forbidden=0o022)).get_single_data()
        except BadKeyFile as error:
            raise KeysError([f"transport.peers_file: {error}"]) from None
        except yaml.MarkedYAMLError as error:
            line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise KeysError([f"transport.peers_file {path} is not YAML: there is an error{line}"]) from None
        except Exception:  # also PyYAML's KeyErrors and AttributeErrors, and nesting that is too deep
            raise KeysError([f"transport.peers_file {path} is not YAML"]) from None
        if not isinstance(entries, dict) or not all(isinstance(each, dict) for each in entries.values()):
            sentence = "expected a line NAME: {key: …, role: …} for each peer"
            raise KeysError([f"transport.peers_file {path}: {sentence}"])
        return cls._parse(path, {str(name): entry for name, entry in entries.items()})

    @classmethod
    def _parse(cls, path: Path, entries: dict[str, dict[str, Any]]) -> Principals:
        problems, found = [], []
        default = entries.pop(DEFAULT, {})
        try:
            shared = Quotas.model_validate(default.get("quotas", {}))
            if default.keys() - {"quotas"}:
                problems.append(f"{DEFAULT}: it has quotas only, and is nobody's name")
        except ValidationError as error:
            shared = Quotas()
            problems += [f"{DEFAULT}.quotas.{line}" for line in _lines(error)]
        for name, entry in entries.items():
            if not NAME.fullmatch(name):
                problems.append("a name has 1 to 64 letters, digits, dots, hyphens and underscores")
                continue
            if "name" in entry:
                problems.append(f"{name}.name: there is no such key")
            try:
                own = Principal.model_validate({**entry, "name": name})
            except ValidationError as error:
                problems += [f"{name}.{line}" for line in _lines(error)]
                continue
            quotas = {**shared.model_dump(), **own.quotas.model_dump(exclude_unset=True)}
            found.append(own.model_copy(update={"quotas": Quotas(**quotas)}))
        by_key: dict[str, Principal] = {}
        for each in found:
            if (other := by_key.setdefault(each.key, each)) is not each:
                problems.append(f"{other.name} and {each.name} have the same key")
        if problems:
            raise KeysError(f"transport.peers_file {path}: {problem}" for problem in problems)
        return cls(by_key, {each.name: each for each in found})


def _lines(error: ValidationError) -> Iterator[str]:
    return map(_line, error.errors(include_url=False, include_input=False))


def _line(found: ErrorDetails) -> str:
    message = "there is no such key" if found["type"] == "extra_forbidden" else found["msg"]
    return f"{'.'.join(map(str, found['loc']))}: {message.removeprefix('Value error, ')}"
