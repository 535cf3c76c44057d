"""From a file, the environment and flags to one checked configuration: flag > environment > file > default."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from instep.config.endpoint import local_address
from instep.config.errors import ConfigError, Problem
from instep.config.rules import contradictions
from instep.config.sections import Config, Section
from instep.config.yaml_file import parse_yaml, read_yaml

ENVIRONMENT_PREFIX: Final = "INSTEP_"

_SECTIONS: Final[dict[str, type[Section]]] = {
    name: type(section) for name, section in Config() if isinstance(section, Section)
}
KEYS: Final = tuple(f"{name}.{key}" for name, section in _SECTIONS.items() for key in section.model_fields)
"""Every key as `section.key`, in the order of `configs/default.yaml`."""


@dataclass(frozen=True, slots=True)
class _Given:
    """One value somebody gave."""

    path: str
    value: Any
    layer: Literal["file", "environment", "flag"]
    source: str
    """For people: the file, the variable's name, or `flag`."""
    base: Path
    """The folder that relative paths in it start from."""


def load_config(
    file: Path | None = None,
    overrides: Mapping[str, str | None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The configuration from a YAML file, an environment and flags, strongest last.

    Args:
        file: a YAML file; relative paths in it are relative to its folder.
        overrides: flags, as text by `section.key`; None for a key that was named without a value.
        environ: variables; those named `INSTEP_<SECTION>__<KEY>` count.

    Raises:
        ConfigError: holding every problem.
    """
    return explain_config(file, overrides, environ)[0]


def explain_config(
    file: Path | None = None,
    overrides: Mapping[str, str | None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Config, dict[str, str]]:
    """As `load_config`, and for every `section.key` where its value came from.

    Raises:
        ConfigError: holding every problem.
    """
    document, problems = read_yaml(file) if file else ({}, [])
    given: list[_Given] = []
    if file:
        problems += _misplaced_sections(document, file)
        given += _from_file(document, file)
    given += _from_environment(environ or {})
    given += (_Given(path, text, "flag", "flag", Path()) for path, text in (overrides or {}).items())

    laid = _Layers()
    for each in given:
        laid.add(each)
    sections = {name: _section(name, laid.values) for name in _SECTIONS}
    sources = {path: laid.taken[path].source if path in laid.taken else "default" for path in KEYS}
    draft = Config().model_copy(update=sections)  # not validated
    problems += laid.problems
    problems += _durability_without_recording(draft, laid)
    problems += _absent_folder(draft, laid)
    problems += (
        Problem(each.paths[0], sources[each.paths[0]], each.message, each.suggestion)
        for each in contradictions(draft)
        if laid.broken.isdisjoint(each.paths)
    )
    if problems:
        raise ConfigError(problems, draft.log)
    return Config.model_validate(sections), sources


class _Layers:
    """Values laid over each other, the weakest added first."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.taken: dict[str, _Given] = {}
        self.broken: set[str] = set()
        """Paths of which some value is wrong; what depends on them is not judged."""
        self.problems: list[Problem] = []

    def add(self, given: _Given) -> None:
        if given.path not in KEYS:
            self.problems.append(_unknown_key(given))
            return
        if given.layer == "flag" and given.value is None:
            self.broken.add(given.path)
            suggestion = "it should look like --set limits.max_idle_s=60"
            self.problems.append(Problem(given.path, given.source, "it has no value", suggestion))
            return
        try:
            value = _checked(given)
        except (ValueError, RuntimeError) as error:
            self.broken.add(given.path)
            self.problems += _problems_of(given, error)
        else:
            self.values[given.path], self.taken[given.path] = value, given


def _durability_without_recording(draft: Config, laid: _Layers) -> Iterator[Problem]:
    """Somebody asks for durable answers, and nothing is recorded: a file that repeats the default does not ask."""
    given = laid.taken.get("recording.durability")
    if given is None or draft.recording.file is not None or given.value == "memory":
        return
    if given.layer != "file" or given.value != Config().recording.durability:
        message = f"durability {given.value} needs a recording"
        yield Problem(given.path, given.source, message, "name a recording.file (--record FILE), or leave this out")


def _absent_folder(draft: Config, laid: _Layers) -> Iterator[Problem]:
    """A slash at the end asks for a folder of recordings; without that folder a file of its name would be written."""
    given, place = laid.taken.get("recording.file"), draft.recording.file
    if given is not None and place is not None and str(given.value).endswith("/") and not os.path.isdir(place):
        suggestion = "make it, or leave out the slash to record into a file of that name"
        yield Problem(given.path, given.source, f"there is no folder {given.value}", suggestion)


def unknown_variables(environ: Mapping[str, str], endpoint: str) -> list[str]:
    """Sentences about variables that look like settings and are none.

    Args:
        environ: the variables.
        endpoint: where the server listens; a variable that sends clients there is right.
    """
    sentences = []
    for name in sorted(environ):
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if key == name or "__" in key:
            continue  # nobody's, or a key, which is checked with the others
        if name == "INSTEP_MODEL":
            sentences.append(f"{name} is for clients; the server's is {environment_name('model.folder')}")
            continue
        if name == "INSTEP_ENDPOINT":
            here = environment_name("transport.endpoint")
            if here not in environ and local_address(environ[name]) != local_address(endpoint):
                sentences.append(f"{name} is for clients; the server's is {here}")
            continue
        meant = [path for path in KEYS if path.partition(".")[2] == key.lower()] or [
            path for path in KEYS if path.replace(".", "_") == key.lower()
        ]
        hint = f"did you mean {environment_name(meant[0])}?" if meant else "instep config lists every setting"
        sentences.append(f"{name} is no setting, and was ignored; {hint}")
    return sentences


def _misplaced_sections(document: Mapping[str, Any], file: Path) -> Iterator[Problem]:
    for name, body in document.items():
        if name not in _SECTIONS:
            yield Problem(name, f"file {file}", "there is no such section", _did_you_mean(name, (*_SECTIONS, *KEYS)))
        elif body is not None and not isinstance(body, dict):
            message = f"it should be a section with keys, not {_short(body)}"
            yield Problem(name, f"file {file}", message, f"write it as {name}: and its keys indented below")


def _from_file(document: Mapping[str, Any], file: Path) -> Iterator[_Given]:
    for name, body in document.items():
        if name in _SECTIONS and isinstance(body, dict):
            for key, value in body.items():
                yield _Given(f"{name}.{key}", value, "file", f"file {file}", file.parent)


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    for name, text in environ.items():
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if key != name and "__" in key:
            yield _Given(key.lower().replace("__", "."), text, "environment", name, Path())


def _checked(given: _Given) -> Any:
    """The value as the key's own type.

    It goes through JSON because there pydantic's strict mode means: no text where a number belongs, yet paths may
    be text and tuples may be lists.
    """
    name, key = given.path.split(".")
    value = given.value if given.layer == "file" else _from_text(given)
    checked = _SECTIONS[name].model_validate_json(json.dumps({key: value}, default=str), strict=True)
    return _resolved(getattr(checked, key), given.base)


def _resolved(value: Any, base: Path) -> Any:
    """A value with every path in it made absolute."""
    if isinstance(value, Path):
        return (base / value.expanduser()).resolve()
    if isinstance(value, dict):
        return {name: _resolved(each, base) for name, each in value.items()}
    return tuple(_resolved(each, base) for each in value) if isinstance(value, tuple) else value


def _from_text(given: _Given) -> Any:
    """A flag's or variable's text as what YAML would hold: as it is where the key takes text, else parsed.

    Where the key takes a list or a mapping, too, the bracket that begins one is the sign to parse it.
    """
    name, key = given.path.split(".")
    annotation = _SECTIONS[name].model_fields[key].annotation
    options = get_args(annotation) or (annotation,)
    if type(None) in options and given.value in ("", "null"):
        return None
    takes_several = any(get_origin(option) in (tuple, dict) for option in options)
    takes_text = any(option in (str, Path) or isinstance(option, str) for option in options)
    if takes_text and not (takes_several and given.value[:1] in ("[", "{")):
        return given.value
    value, duplicates = parse_yaml(given.value)
    if duplicates:
        raise ValueError(duplicates[0])
    return value


def _section(name: str, values: Mapping[str, Any]) -> Section:
    section = _SECTIONS[name]
    paths = {key: f"{name}.{key}" for key in section.model_fields}
    return section.model_construct(**{key: values[path] for key, path in paths.items() if path in values})


def _problems_of(given: _Given, error: ValueError | RuntimeError) -> Iterator[Problem]:
    """What `_checked` found wrong with one key, in our words."""
    if isinstance(error, RuntimeError):  # of `Path.expanduser`
        message = f"there is no home directory for {_short(given.value)}"
        yield Problem(given.path, given.source, message, "write the whole path")
        return
    if not isinstance(error, ValidationError):
        yield Problem(given.path, given.source, f"it is not valid YAML: {error}", _default(given.path))
        return
    name = given.path.split(".")[0]
    for found in error.errors(include_url=False):
        path = ".".join([name, *map(str, found["loc"])])
        message = found["msg"].removeprefix("Value error, ")
        if message.startswith("Input "):  # pydantic's own; ours name the value themselves
            message = f"it {message.removeprefix('Input ')}, not {_short(found['input'])}"
        yield Problem(path, given.source, message, _suggestion(given, found))


def _suggestion(given: _Given, found: ErrorDetails) -> str:
    """The word that was meant, where there are only a few and one is close; else the default."""
    if found["type"] == "literal_error" and isinstance(given.value, str):
        words = re.findall(r"'([^']+)'", found["ctx"]["expected"])
        if close := get_close_matches(given.value.lower(), words, n=1):
            return f"did you mean {close[0]}?"
    return _default(given.path)


def _unknown_key(given: _Given) -> Problem:
    known: Iterable[str] = KEYS
    path = given.path
    if given.layer == "environment":
        known = [environment_name(each) for each in KEYS]
        path = given.source
    return Problem(given.path, given.source, "there is no such key", _did_you_mean(path, known))


def environment_name(path: str) -> str:
    """The variable that sets `section.key`."""
    return ENVIRONMENT_PREFIX + path.upper().replace(".", "__")


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    known = list(known)
    last = wrong.rpartition(".")[2]
    close = [each for each in known if each.rpartition(".")[2] == last] or get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}?" if close else "configs/default.yaml lists every key"


def _default(path: str) -> str:
    name, key = path.split(".")
    default = getattr(_SECTIONS[name](), key)
    if default is None:
        return f"see {path} in configs/default.yaml"
    return f"the default is {json.dumps(default)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
