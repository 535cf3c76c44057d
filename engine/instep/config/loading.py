"""Builds a checked configuration: flags override the environment, which overrides the file, then the defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from instep.config.sections import NO_RECORDING, Config, LogConfig

_PREFIX: Final = "INSTEP_"
_CLIENTS: Final = ("INSTEP_ENDPOINT", "INSTEP_MODEL", "INSTEP_KEY_FILE", "INSTEP_SERVER_KEY", "INSTEP_DIRECTORY")
"""Environment variables with the prefix that are for clients."""
_FIELDS: Final = {
    f"{name}.{key}": field for name, section in Config() for key, field in type(section).model_fields.items()
}
KEYS: Final = tuple(_FIELDS)
"""Every key as `section.key`, in the order of `configs/default.yaml`."""
_FORMER: Final = {"recording.file": "recording.path"}
"""Keys that have been renamed."""
_PLACES: Final = tuple(key for key, field in _FIELDS.items() if "Path" in repr(field.annotation))
"""Keys whose values are paths."""


_KINDS: Final[dict[Any, str]] = {bool: "true or false", int: "a whole number", float: "a number"}
_UNITS: Final = {"us": "microseconds", "s": "seconds", "size": "streams"}
"""Units of numbers by the last word of the key, where that is not the unit itself."""


class ConfigError(Exception):
    """The configuration cannot be used.

    Attributes:
        problems: a sentence for each problem.
        log: the section `log`, or None if that has problems too.
    """

    def __init__(self, problems: Iterable[str], log: LogConfig | None = None) -> None:
        self.problems = tuple(problems)
        self.log = log
        super().__init__("\n".join(self.problems))


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which PyYAML keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: D102 - as of yaml.SafeLoader
        node, seen = super().compose_mapping_node(anchor), set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def load_config(file: Path | None = None, flags: Mapping[str, str] | None = None) -> Config:
    """Load the configuration from a YAML file, the environment and flags; later ones override earlier ones.

    Args:
        file: a YAML file; relative paths in it are relative to its folder.
        flags: text by `section.key`.

    Raises:
        ConfigError: with every problem.
    """
    return explain_config(file, flags)[0]


def explain_config(file: Path | None = None, flags: Mapping[str, str] | None = None) -> tuple[Config, dict[str, str]]:
    """Load like `load_config`, and return the source of each value by `section.key`.

    Raises:
        ConfigError: with every problem.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(KEYS, "default")
    for source, path, value in _given(file, flags or {}):
        name, _, key = path.partition(".")
        section = values.setdefault(name, {})
        sources[path] = source
        if not key:
            values[name] = value
        elif isinstance(section, dict):
            section[key] = value
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = (line for each in error.errors(include_url=False) for line in _lines(each, sources))
        problems = list(dict.fromkeys(lines))  # each member of a union has an error
    else:
        asked = sources["recording.durability"]  # a file that repeats the default does not ask for it
        if config.recording.path or config.recording.durability == "memory" or asked in ("default", f"file {file}"):
            return config, sources
        problems = [f"recording.durability ({asked}): {NO_RECORDING}"]
    try:
        log = LogConfig.model_validate(values.get("log", {}))
    except ValidationError:
        log = None
    raise ConfigError(problems, log)


def unknown_variables() -> list[str]:
    """Return a sentence for each environment variable that looks like a setting but is not one."""
    known = [_variable(path) for path in KEYS]
    return [
        f"{name} is not a setting, and was ignored; {_did_you_mean(name, known)}"
        for name in sorted(os.environ)
        if name.startswith(_PREFIX) and "__" not in name and name not in _CLIENTS
    ]


def _given(file: Path | None, flags: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """Source, `section.key` and value of every given setting, the weakest source first."""
    found = [] if file is None else [(f"file {file}", *each, file.parent) for each in _from_file(file)]
    for name, text in os.environ.items():
        section, separator, key = name.removeprefix(_PREFIX).lower().partition("__")
        if name.startswith(_PREFIX) and separator:  # INSTEP_MODEL is not the section `model`
            found.append((name, f"{section}.{key}", text, Path()))
    found += (("flag", *each, Path()) for each in flags.items())
    return ((source, path, _placed(value, base) if path in _PLACES else value) for source, path, value, base in found)


def _variable(path: str) -> str:
    return f"{_PREFIX}{path.replace('.', '__').upper()}"


def _from_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as stream:
            document = UniqueKeyLoader(stream).get_single_data() or {}
        sections = {str(name): section for name, section in document.items()}
    except OSError as error:
        raise ConfigError([f"file {file}: it cannot be read: {error.strerror}"]) from None
    except Exception as error:  # also PyYAML's KeyErrors and AttributeErrors, of texts that do not fit their tags
        what = _in_a_line(error) if isinstance(error, yaml.YAMLError) else "it holds no sections with keys"
        raise ConfigError([f"file {file}: it is not a configuration in YAML: {what}"]) from None
    for name, section in sections.items():
        if isinstance(section, dict):
            yield from ((f"{name}.{key}", value) for key, value in section.items())
        elif section is not None:
            yield name, section


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _placed(value: Any, base: Path) -> Any:
    """Parse a path, or several, or none, from text; an error becomes a value that every key refuses."""
    try:
        return _absolute(value, base)
    except Exception as error:  # of PyYAML, as for a file, and of paths
        return error


def _absolute(value: Any, base: Path) -> Any:
    if isinstance(value, str):
        if value[:1] in ("[", "{"):
            value = UniqueKeyLoader(value).get_single_data()
        elif value in ("", "null"):
            return None
        else:
            return str((base / os.path.expanduser(value)).resolve())
    if isinstance(value, dict):
        return {name: _absolute(each, base) for name, each in value.items()}
    return [_absolute(each, base) for each in value] if isinstance(value, list) else value


def _lines(found: ErrorDetails, sources: Mapping[str, str]) -> list[str]:
    """A sentence about an invalid value, or one per line about values that contradict each other."""
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error" and len(found["loc"]) < 2:
        contradictions = [line.partition(": ") for line in message.splitlines()]
        return [f"{first} ({sources[first]}): {why}" for first, _, why in contradictions]
    path = ".".join(map(str, found["loc"][:2]))
    if path not in sources:  # a section
        path = next(key for key in sources if key.startswith(f"{path}."))
    if isinstance(found["input"], Exception):
        message = f"it is no path: {_in_a_line(found['input'])}"
    elif found["type"] == "extra_forbidden":
        message = f"there is no such key; {_did_you_mean(path, KEYS)}"
    elif path in _FIELDS and (description := _FIELDS[path].description):
        message = f"expected {description}"
    elif found["type"] != "value_error":
        message = f"expected {_expected(path, message)}, not {found['input']!r:.60}"
    return [f"{path} ({sources[path]}): {message}"]


def _expected(path: str, message: str) -> str:
    """A valid value in words, such as `a number of seconds, greater than 0`."""
    rest, kind = message.removeprefix("Input should be "), _KINDS.get(path in _FIELDS and _FIELDS[path].annotation)
    if kind is None:
        return rest if path in _FIELDS else "keys with values"
    unit = path.rpartition("_")[2]
    words = kind if kind == _KINDS[bool] else f"{kind} of {_UNITS.get(unit, unit)}"
    return f"{words}, {rest}" if "than" in rest else words


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    if name in _FORMER:
        return f"it is called {_FORMER[name]} now"
    key = name.rpartition(".")[2]
    close = [each for each in known if each.rpartition(".")[2] == key]  # the same key of another section
    close = close or get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else "configs/default.yaml lists every key"
