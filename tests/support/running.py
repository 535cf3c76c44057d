"""A real server in the test's own event loop, bound to loopback, stopped with the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch

from instep.config import Config
from instep.frontends.shards import Shard
from instep.models.base import RecurrentModel
from instep.models.model import Model
from instep.models.registry import build
from instep.runtime.stepper import Stepper
from instep.server.assembly import make_server
from instep.server.live_verification import Supervision
from instep.server.preparation import Prepared
from instep.server.server import Server
from tests.support.warm import start_checker

CPU = torch.device("cpu")
IN_FORKS = Supervision(start_checker)


_NETWORKS: dict[str, RecurrentModel] = {}


def prepared(model: Model, device: torch.device = CPU) -> Prepared:
    """The model, ready to be served; compiled once for each test run."""
    torch.set_num_threads(1)
    key = f"{model.fingerprint} {device}"
    if key not in _NETWORKS:
        _NETWORKS[key] = build(model, device)
    return Prepared(model, Path("model"), _NETWORKS[key])


def config(**sections: dict[str, Any]) -> Config:
    """A configuration for tests: any free port, no admin server, and what the test asks for.

    Tables of as many pending frames as a message may have take a third of the time of those of the default.
    """
    transport = {"endpoint": "tcp://127.0.0.1:*", **sections.pop("transport", {})}
    http = {"endpoint": "off", **sections.pop("http", {})}
    limits = {"max_pending_frames": 16_384, **sections.pop("limits", {})}
    return Config.model_validate({"transport": transport, "http": http, "limits": limits, **sections})


@contextlib.asynccontextmanager
async def running(
    *models: Model,
    stepper: Callable[[Prepared, Config], Stepper] | None = None,
    apart: bool = False,
    failure: str | None = None,
    told: list[dict[str, Any]] | None = None,
    device: torch.device = CPU,
    folder: Path = Path("model"),
    supervision: Supervision = IN_FORKS,
    shard: Shard | None = None,
    **sections: dict[str, Any],
) -> AsyncIterator[Server]:
    """Serve these models while the block runs; sections as in the configuration file.

    Args:
        models: what is served.
        stepper: makes another stepper than usual.
        apart: whether steps get a process of their own, and not a thread.
        failure: why the server is expected to stop by itself.
        told: what the server logs is put there, with its level.
        device: where the network is.
        folder: where recordings are told that the model is.
        supervision: how the process that checks is run.
        shard: the server's place in a cluster.
        sections: keys of the configuration by section.
    """
    settings = config(**sections)
    ready = [replace(prepared(model, device), model=model, model_path=folder) for model in models]
    log = log_into([] if told is None else told)
    server = make_server(settings, ready, log, stepper, forks=apart, supervision=supervision, shard=shard)
    serving = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        server.stop()
        await serving
    assert server.shutdown.failure == failure


def log_into(told: list[dict[str, Any]]) -> structlog.stdlib.BoundLogger:
    """A log that keeps what it is told, with its level."""

    def note(_: Any, level: str, fields: MutableMapping[str, Any]) -> str:
        told.append({"level": level, **fields})
        return ""

    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(structlog.ReturnLogger(), [note])
    return log
