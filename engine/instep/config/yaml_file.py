"""Reading a configuration file: YAML without its surprises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from instep.config.errors import Problem
from instep.yaml_problem import yaml_problem


class _Loader(yaml.SafeLoader):
    """Safe YAML in which keys are words, no key stands twice, and `1e-3` is a number.

    `duplicates` collects one message a repeated key, so that all of them can be reported at once.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not used here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)  # YAML 1.1 reads 1e-3 as text


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, and a message for each repeated key in it (the first one counts).

    Raises:
        ValueError: naming the line, when it is not YAML or uses what is not allowed here.
    """
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.duplicates
    except yaml.YAMLError as error:
        raise ValueError(yaml_problem(error)) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except (AttributeError, LookupError):  # PyYAML's on a tag such as !!bool with a text that is none
        raise ValueError("a value in it does not fit its tag") from None


def read_yaml(file: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The sections of a configuration file; whatever is wrong with the file as a whole comes as problems."""
    source = f"file {file}"
    try:
        document, duplicates = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"it cannot be read: {error.strerror}"
        return {}, [Problem("", source, message, "name a file that exists and that you may read")]
    except UnicodeDecodeError:
        return {}, [Problem("", source, "it is not a text file", "save it as UTF-8 YAML")]
    except ValueError as error:
        return {}, [Problem("", source, f"it is not valid YAML: {error}", "correct it there")]
    problems = [Problem("", source, message, "keep one of them") for message in duplicates]
    if document is None:  # empty, or comments only
        document = {}
    if not isinstance(document, dict):
        found = type(document).__name__
        problems.append(Problem("", source, f"it holds a {found}, not sections with keys", "see configs/default.yaml"))
        document = {}
    return document, problems
