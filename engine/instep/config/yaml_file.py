"""Reading a configuration file: YAML without its surprises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from instep.config.errors import Problem
from instep.plain_yaml import PlainLoader, yaml_problem


class _Loader(PlainLoader):
    """A `PlainLoader` that reads `1e-3` as a number, too."""


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
