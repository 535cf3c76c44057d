"""`instep doctor`: shows versions and the machine, and each problem that the checks find, with its cure."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import structlog

from instep.config import Config, ConfigError, load_config, unknown_variables
from instep.memory import size, usable_memory
from instep.models.errors import ModelError
from instep.models.portable.machine import host
from instep.runtime.executor import usable_cores
from instep.server.checks import CannotServe, Finding, rehearse
from instep.server.recording_files import nearest_folder
from instep_tools.machine import machine

_SYNCS: Final = 9
SLOW_SYNC_MS: Final = 10.0


def doctor(file: Path | None, flags: Mapping[str, str], demo: Path, as_json: bool, write: Callable[[str], None]) -> int:
    """Examine this machine, and what `instep serve` would do on it.

    Args:
        file: the configuration.
        flags: settings, by `section.key`.
        demo: the model to examine if no other is named.
        as_json: whether to write one JSON object instead of text.
        write: called with the lines of the result.

    Returns:
        0; 1 if a server could not start.
    """
    findings = [Finding("warning", sentence, "correct the variable, or unset it") for sentence in unknown_variables()]
    config: Config | None = None
    try:
        config = load_config(file, flags)
    except ConfigError as error:
        findings += (Finding("problem", problem, "") for problem in error.problems)
    facts = _machine()
    findings += _disk(config or Config(), facts)
    if config is not None:
        if config.model.folder is None:
            config = config.with_values({"model.folder": demo})
        try:
            rehearse(config, _collecting(findings, facts))
        except (CannotServe, ModelError) as error:
            findings += (Finding("problem", line, "") for line in str(error).splitlines())
    problems, warnings = ([each for each in findings if each.severity == kind] for kind in ("problem", "warning"))
    if as_json:
        said = {"warnings": warnings, "problems": problems}
        advice = {name: [{"what": each.what, "cure": each.cure} for each in found] for name, found in said.items()}
        write(json.dumps({"facts": facts, **advice}, indent=2))
    else:
        for line in _in_words(facts, warnings, problems):
            write(line)
    return 1 if problems else 0


def _machine() -> dict[str, Any]:
    import torch

    found = machine()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        **found.pop("versions"),
        **found,
        "cores usable": usable_cores(),
        "memory usable": size(usable_memory()),
        "fma": host().has_fma,
        "gpus": ", ".join(gpus) or "none that torch finds",
    }


def _disk(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """Write and remove a small file next to the recording or, without one, in the working directory."""
    folder = nearest_folder(config.recording.path or Path.cwd())
    times = []
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".instep-doctor-") as written:
            for _ in range(_SYNCS):
                written.write(bytes(4096))
                written.flush()
                began = time.perf_counter()
                os.fsync(written.fileno())
                times.append((time.perf_counter() - began) * 1000)
    except OSError:  # the check of the recording says what to do
        return
    facts["sync_ms"] = round(median(times), 3)
    if facts["sync_ms"] > SLOW_SYNC_MS and config.recording.path is not None:
        yield Finding(
            "warning",
            f"a sync of the disk takes {facts['sync_ms']:.0f} ms: with recording.durability fsync every answer waits "
            "for one, and with commit the recorder falls behind",
            "use a local SSD; durability commit survives a crash of the server without waiting for the disk",
        )


def _collecting(findings: list[Finding], facts: dict[str, Any]) -> structlog.stdlib.BoundLogger:
    """A log whose warnings become findings, and whose lines on models and recordings become facts."""

    def note(_: object, level: str, fields: structlog.typing.EventDict) -> str:
        event = str(fields.pop("event"))
        if level in ("warning", "error"):
            what = str(fields.get("reason", "")) if event == "will hurt" else f"{event}: {fields.get('reason', '')}"
            cure = str(fields.get("next", "docs/operations.md explains each line of the log"))
            findings.append(Finding("warning", what, cure))
        elif event not in ("compiled", "loading"):
            about = " ".join((event, *([str(fields.pop("model"))] if "model" in fields else [])))
            facts[about] = ", ".join(f"{name} {value}" for name, value in fields.items())
        return ""

    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(structlog.ReturnLogger(), [note])
    return log


def _in_words(facts: Mapping[str, Any], warnings: list[Finding], problems: list[Finding]) -> Iterator[str]:
    yield from (f"{name}: {value}" for name, value in facts.items())
    yield ""
    for title, found in (("warning", warnings), ("cannot start", problems)):
        yield from (f"{title}: {each}" for each in found)
    if not (warnings or problems):
        yield "nothing to warn of"
