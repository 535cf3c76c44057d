"""YAML without its surprises, for configurations and model folders alike."""

from __future__ import annotations

import re
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """Safe YAML in which keys are words, without aliases: a few lines of them could fill the memory.

    `duplicates` collects one message a repeated key, the first of which counts, so that all can be reported at once.
    """

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As of PyYAML, without aliases."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not used here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """As of PyYAML, without repeated keys or such as are not words."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "keys with values are expected", node.start_mark)
        mapping: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                message = f"the key {key!r} is not a word"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if key in lines:
                self.duplicates.append(f"the key {key!r} stands twice, in lines {lines[key]} and {line}")
                continue
            lines[key] = line
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """The end of a sentence, which names the line where PyYAML knows it."""
    if isinstance(error, yaml.MarkedYAMLError):
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or ""
        return f"{where}{error.context}, {problem}" if problem.startswith("but ") else f"{where}{problem}"
    return re.sub(r'in "<[a-z ]+>", ', "at ", " ".join(str(error).split()))
