"""`instep doctor`: look at everything in turn, and print it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Final

from instep.config import Config
from instep.doctor.findings import Findings

QUIET_S: Final = 2.0
"""Work shorter than this shows no progress."""


def doctor(
    file: Path | None,
    overrides: Mapping[str, str],
    demo: Path,
    as_json: bool,
    write: Callable[[str], None],
    progress: Callable[[str], None],
) -> int:
    """Examine this machine, and what `instep serve` would do here.

    Args:
        file: the configuration.
        overrides: settings, by `section.key`.
        demo: the model that is examined where no other is named.
        as_json: one JSON object instead of text.
        write: takes the lines of the result.
        progress: takes a sentence when something takes longer than two seconds.

    Returns:
        0, or 1 when a server could not start.
    """
    findings = Findings()

    @contextmanager
    def step(what: str) -> Iterator[None]:
        """Write what the block finds, and say what takes it long."""
        timer, known = Timer(QUIET_S, progress, [what]), len(findings.sections)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        for section in [] if as_json else findings.sections[known:]:
            for line in section.lines():
                write(line)

    with step("loading PyTorch"):
        from instep.doctor.disk import examine_disk
        from instep.doctor.machine import examine_machine
        from instep.doctor.serving import examine_config, examine_endpoints, examine_models
        from instep.doctor.software import examine_software
    with step("reading the configuration"):
        wanted = examine_config(findings, file, overrides)
        config = wanted or Config()
    with step("looking at libraries and GPUs"):
        examine_software(findings, config)
    with step("looking at the machine"):
        memory = examine_machine(findings, config)
    with step("syncing the disk"):
        examine_disk(findings, wanted)
    if wanted is not None:
        with step("asking who answers at the endpoints"):
            is_served = examine_endpoints(findings, wanted)
        with step("compiling the model, and reading its recording where there is one"):
            examine_models(findings, wanted, demo, memory, is_served)
    if as_json:
        write(json.dumps(findings.as_json(), indent=2))
    else:
        write("")
        for line in findings.verdict():
            write(line)
    sys.stdout.flush()
    return 1 if findings.problems else 0
