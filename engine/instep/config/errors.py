"""Errors in a configuration: every problem at once, each with its place and a suggestion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instep.config.sections import LogConfig


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration."""

    path: str
    """Dotted: `limits.max_idle_s`; empty when it is about a file as a whole."""
    source: str
    """Where the value came from: `file serve.yaml`, an environment variable's name, `flag` or `default`."""
    message: str
    suggestion: str

    def __str__(self) -> str:
        place = f"{self.path} ({self.source})" if self.path else self.source
        return f"{place}: {self.message}; {self.suggestion}"


class ConfigError(Exception):
    """The configuration cannot be used.

    Attributes:
        problems: everything that is wrong with it, at least one.
        log: its section of that name, as far as that can be read; None where there is none.
    """

    def __init__(self, problems: Sequence[Problem], log: LogConfig | None = None) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)
        self.log = log
