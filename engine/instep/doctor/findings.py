"""The findings of the doctor: facts in sections, warnings and problems, as text or JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

COLUMNS: Final = 80


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that hurts, or keeps a server from starting."""

    what: str
    cure: str


@dataclass(slots=True)
class FactSheet:
    """Facts about one thing."""

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    """For machines: plain values of JSON."""
    texts: dict[str, str] = field(default_factory=dict)
    """For people."""

    def note(self, name: str, value: Any, text: str | None = None) -> None:
        """Add a fact; its text is the value where none is given."""
        self.values[name] = value
        self.texts[name] = str(value) if text is None else text

    def lines(self) -> Iterator[str]:
        """The section in lines of 80 columns."""
        yield self.title
        labels = [_label(name) for name in self.texts]
        indent = 2 + max(map(len, labels), default=0) + 2
        for label, text in zip(labels, self.texts.values(), strict=True):
            lines = textwrap.wrap(text, COLUMNS - indent, break_on_hyphens=False) or ["–"]
            yield f"  {label:<{indent - 2}}{lines[0]}"
            yield from (" " * indent + line for line in lines[1:])


@dataclass(slots=True)
class Findings:
    """Everything that was found."""

    sections: list[FactSheet] = field(default_factory=list)
    warnings: list[Advice] = field(default_factory=list)
    problems: list[Advice] = field(default_factory=list)
    """Why a server could not start."""

    def section(self, title: str) -> FactSheet:
        """Begin a section."""
        self.sections.append(FactSheet(title))
        return self.sections[-1]

    def warn(self, what: str, cure: str) -> None:
        """Something will hurt."""
        self.warnings.append(Advice(what, cure))

    def fail(self, what: str, cure: str) -> None:
        """A server could not start."""
        self.problems.append(Advice(what, cure))

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "facts": {section.title: section.values for section in self.sections},
            "warnings": [asdict(each) for each in self.warnings],
            "problems": [asdict(each) for each in self.problems],
        }

    def verdict(self) -> Iterator[str]:
        """Warnings and problems with their cures, in lines of 80 columns."""
        for title, advice in (("warning", self.warnings), ("cannot start", self.problems)):
            for each in advice:
                yield from _wrapped(f"{title}: ", each.what)
                yield from _wrapped("  → ", each.cure)
        if not (self.warnings or self.problems):
            yield "nothing to warn of"


def _label(name: str) -> str:
    """What people read beside a fact's text, which has the unit: `sync`, not `sync_ms`; settings keep their names."""
    return name if "." in name else re.sub("_(ms|bytes)$", "", name).replace("_", " ")


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent="    ", break_on_hyphens=False)
