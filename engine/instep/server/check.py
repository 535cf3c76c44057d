"""`instep serve --check`: everything that a start needs is tried, and nothing is written or served."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from instep.config import Config
from instep.frontends import CannotListen
from instep.frontends.http.admin import bind
from instep.frontends.http.security import read_token
from instep.frontends.zmq.router import Router
from instep.recording.database import check_place, lost_tail
from instep.recording.errors import RecordingError, with_advice
from instep.recording.lock import check_not_written
from instep.recording.reader import RecordingReader
from instep.recording.records import refuse_other_model
from instep.replay.recovery import look_through
from instep.server.limits import effective_limits
from instep.server.log import make_log
from instep.server.memory import warn_of_memory
from instep.server.preparation import CannotServe, Prepared, check_early, log_of, prepare
from instep.server.recordings import find_recording, recording_header


def check(config: Config, *, restart: bool = False) -> None:
    """Load and compile the models, look through what of their recordings a start reads, and try the endpoints.

    The log says what would be served. `restart` is as of `serve.run`.

    Raises:
        CannotServe: when the server could not start.
    """
    log = make_log(config.log)
    check_early(config, restart=restart)
    prepared = prepare(config, log, restart=restart)
    warn_of_memory(config, prepared, log)
    check_models(config, prepared, log)
    admin = {"http": _with_port(f"http://{config.http.endpoint}")} if check_endpoints(config, log) else {}
    for each in prepared:
        log.info(
            "can serve",
            endpoint=_with_port(config.transport.endpoint),
            **admin,
            model=each.model.name,
            device=str(each.device),
            exactness=each.exactness,
            max_streams=config.engine.max_streams,
        )


def _with_port(endpoint: str) -> str:
    """An endpoint, and that its port is a free one where none is named."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:PORT, a free one" if port in ("0", "*") else endpoint


def check_models(config: Config, prepared: Sequence[Prepared], log: structlog.stdlib.BoundLogger) -> None:
    """Fit the limits to the models, and look through what of their recordings a start reads.

    Raises:
        CannotServe: when the server could not start.
    """
    is_only = len(prepared) == 1
    try:
        for each in prepared:
            network = each.network.description
            effective_limits(config, network.features, network.outputs)
            of_model = log_of(each.model.name, log, is_only=is_only)
            if (versions := find_recording(config, each, of_model, is_only=is_only)) is not None:
                _check_recording(versions.file, config, each, of_model)
    except RecordingError as error:
        raise CannotServe(with_advice(error)) from None


def check_endpoints(config: Config, log: structlog.stdlib.BoundLogger) -> bool:
    """Bind the endpoints of ZeroMQ and HTTP, and read the token; whether there would be an admin server.

    Raises:
        CannotServe: when one cannot be bound, or the token cannot be used.
    """
    try:
        Router(config.transport).close()
        read_token(config.http)
        if (listener := bind(config.http, log)) is not None:
            listener.close()
        return listener is not None
    except CannotListen as error:
        raise CannotServe(str(error)) from None


def _check_recording(path: Path, config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> None:
    check_place(path)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RecordingError(f"{path} cannot be written: give this user the right to, or name another file")
    if not path.is_file() or not path.stat().st_size:
        log.info("would record", file=str(path), durability=config.recording.durability)
        return
    check_not_written(path)
    if tail := lost_tail(path):
        log.warning("recording lost its end", file=str(path), reason=tail)
    with RecordingReader(path) as reader:
        refuse_other_model(path, reader.engines[-1].header, recording_header(prepared, config))
    streams, frames = look_through(path)
    log.info("would continue", file=str(path), streams=streams, frames_to_replay=frames)
