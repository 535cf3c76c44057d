"""Facts about the server that would start: configuration, models, endpoint."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from instep.config import Config, ConfigError, explain_config, unknown_variables
from instep.config.endpoint import local_address
from instep.config.sections import ModelConfig
from instep.doctor.findings import Findings
from instep.memory import size
from instep.models.errors import no_folder
from instep.server.check import check_endpoints, check_models
from instep.server.memory import exceeds, memory_when_full
from instep.server.preparation import CannotServe, Prepared, prepare
from instep_client import AsyncClient, Refused
from instep_client.endpoint import nothing_listens
from instep_client.protocol.errors import ConnectionFailed, InstepError

PATIENCE_S: Final = 3.0


def examine_config(findings: Findings, file: Path | None, overrides: Mapping[str, str]) -> Config | None:
    """Read the configuration; None where it cannot be used."""
    section = findings.section("configuration")
    section.note("file", str(file) if file else None, str(file or "none"))
    try:
        config, sources = explain_config(file, overrides)
    except ConfigError as error:
        _warn_of_variables(findings)
        for problem in error.problems:
            findings.fail(problem, "configs/default.yaml explains every key")
        section.note("used", None, "not before its errors are corrected: models and endpoints are not looked at")
        return None
    _warn_of_variables(findings)
    defaults = Config().model_dump(mode="json")
    for name, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            if value != defaults[name][key]:
                path = f"{name}.{key}"
                section.note(path, value, f"{json.dumps(value)} ({sources[path]})")
    if len(section.values) == 1:
        section.note("used", "defaults", "the defaults")
    return config


def _warn_of_variables(findings: Findings) -> None:
    for sentence in unknown_variables():
        findings.warn(sentence, "correct the variable, or unset it if no client needs it")


_CURES: Final = {
    "not exact": "engine.device cpu serves with the same bits in every batch and on every processor: docs/exactness.md",
    "recording lost its end": "instep recordings repair FILE writes everything before the damage to a new file",
}
"""By the event that a start would log, for those that do not say themselves what is next."""


def examine_models(findings: Findings, config: Config, demo: Path, memory_bytes: int, is_served: bool) -> None:
    """Load and compile the models, and look through what of their recordings a start reads.

    Args:
        findings: where the results go.
        config: names the models.
        demo: the model that is used where it names none.
        memory_bytes: what a server may use.
        is_served: whether a server answers at the endpoint, which may be writing the recordings.
    """
    is_named = bool(config.model.folders)
    if not is_named:
        config = config.model_copy(update={"model": ModelConfig(folder=demo)})
    if missing := [folder for _, folder in config.model.folders if not os.path.exists(folder)]:
        for folder in missing:
            findings.fail(*no_folder(folder))
        return
    log = _collecting(findings)
    try:
        prepared = prepare(config, log, is_running=is_served)
    except (CannotServe, RuntimeError) as error:
        findings.fail(str(error).splitlines()[0], "instep serve --check tries it again")
        return
    for each in prepared:
        _model(findings, each, is_named)
    try:
        check_models(config, prepared, log)
    except CannotServe as error:
        if not is_served or "is being written by another instep" not in str(error):
            findings.fail(str(error), "docs/troubleshooting.md lists such sentences with their causes")
    needed = memory_when_full(config, prepared)
    findings.section("limits").note("memory_when_full", needed, f"{size(needed)} for all streams, frames and answers")
    if memory_bytes and needed > memory_bytes:
        findings.warn(
            exceeds(needed, memory_bytes),
            "lower engine.max_streams or limits.window_frames, or give it more memory",
        )


def _model(findings: Findings, prepared: Prepared, is_named: bool) -> None:
    section = findings.section(f"model {prepared.model.name}")
    network = prepared.network
    section.note("folder", str(prepared.model_path), f"{prepared.model_path}{'' if is_named else ' (none was named)'}")
    section.note("fingerprint", prepared.model.fingerprint, prepared.model.fingerprint[:12])
    section.note("kind", network.description.kind)
    section.note("sizes", [network.description.features, network.description.outputs])
    section.note("device", str(prepared.device))
    section.note("exactness", prepared.exactness)
    section.note("arithmetic", prepared.arithmetic)


def _collecting(findings: Findings) -> structlog.stdlib.BoundLogger:
    """A log whose warnings become findings, and what it says of recordings facts."""

    def note(_: object, level: str, fields: structlog.typing.EventDict) -> str:
        event, model = str(fields.pop("event")), fields.pop("model", None)
        if event in ("would record", "would continue"):
            text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
            of_model = [each for each in findings.sections if each.title == f"model {model}"]
            (of_model or findings.sections)[-1].note(event.replace(" ", "_"), dict(fields), text)
        elif level in ("warning", "error"):
            cure = fields.get("next") or _CURES.get(event, "docs/operations.md explains each line of the log")
            of = f" (model {model})" if model else ""
            findings.warn(f"{event}{of}: {fields.get('reason', '')}", cure)
        return ""

    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(structlog.ReturnLogger(), [note])
    return log


def examine_endpoints(findings: Findings, config: Config) -> bool:
    """Ask who answers at the endpoint, and try to bind it, and that of HTTP, where nobody does.

    Returns:
        Whether it is an instep server.
    """
    endpoint = config.transport.endpoint
    section = findings.section("endpoints")
    section.note("transport.endpoint", endpoint)
    section.note("http.endpoint", config.http.endpoint, config.http.endpoint or "off")
    found = "" if endpoint.endswith(":*") else asyncio.run(_who_answers(endpoint))
    is_served = found.startswith("an instep server")
    if not is_served:
        try:
            check_endpoints(config, _collecting(findings))
            found = ""  # also where only ZeroMQ knows the address, as of an interface
        except CannotServe as error:
            findings.fail(str(error), "docs/troubleshooting.md lists such sentences with their causes")
    section.note("found", found or None, found or "nobody listens there")
    return is_served


async def _who_answers(endpoint: str) -> str:
    """Who listens at an endpoint to which a server would bind; empty where nobody does."""
    address = local_address(endpoint)
    try:
        if await nothing_listens(address):
            return ""
    except ConnectionFailed:  # there is no such host
        return ""
    client = AsyncClient(address, "instep doctor", PATIENCE_S, reconnect_s=0.0, model="")
    try:
        async with client:
            ready = (await client.stats()).get("ready") == 1
            return f"an instep server, {'ready' if ready else 'not ready'}, model {client.info.model}"
    except InstepError as error:
        return f"an instep server, not ready: {error}" if isinstance(error, Refused) else "another program"
