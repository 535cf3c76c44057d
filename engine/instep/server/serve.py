"""From a configuration to a running server, and its exit status."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Sequence

import torch

from instep.config import Config
from instep.core.compiled import are_cached
from instep.models.certify import Certification
from instep.server.assembly import make_server
from instep.server.log import make_log
from instep.server.open_files import allow_open_files
from instep.server.preparation import Prepared, prepare
from instep.server.signals import interrupts_call
from instep.streaming.recovery import Recovery
from instep.streaming.warm_up import warm_up

_FILES_BESIDE_CONNECTIONS = 100


def exactness_sentence(certification: Certification) -> str:
    """`exact in buckets 4 … 256`, `within 3 ULP, …` or `not certified, …`."""
    buckets = f"in buckets {', '.join(map(str, certification.buckets))}"
    if certification.exactness == "exact":
        return f"exact {buckets}"
    if certification.exactness == "tolerance":
        return f"not exact, up to {certification.max_ulp} ULP seen in a step, {buckets}"
    return f"not certified {buckets}"


async def _serve(
    config: Config,
    prepared: Prepared,
    compiled_s: float,
    on_ready: Callable[[str], None] | None,
    accept_numerics_change: bool,
    warnings: Sequence[str],
) -> int:
    log = make_log(config.log)
    allowed = allow_open_files(config.limits.max_connections + _FILES_BESIDE_CONNECTIONS)
    if allowed < config.limits.max_connections:
        log.warning(
            "fewer connections", open_files=allowed, reason="the hard limit of open files (ulimit -Hn) is lower"
        )
    server = make_server(config, prepared, log, accept_numerics_change=accept_numerics_change)
    signals = 0

    def interrupted() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            log.info("stopping", hint="finishing what was admitted; interrupt again to force")
        server.stop(drain=signals == 1)

    with interrupts_call(interrupted):
        log.info(
            "serving",
            endpoint=server.endpoint,
            model=prepared.model.name,
            device=str(prepared.device),
            capacity=f"{config.engine.max_streams} streams",
            exactness=exactness_sentence(prepared.certification),
            step=prepared.network.kernel,
            certified_s=round(prepared.certified_s, 4),
            compiled_s=round(compiled_s, 4),
            recording=str(config.recording.file or "none"),
            durability=server.info.durability,
            **_recovered(server.recovery),
        )
        for warning in warnings:
            log.warning("unknown setting", reason=warning)
        largest = prepared.certification.buckets[-1]
        if largest < config.engine.max_batch_size:
            log.warning("smaller batches", max_batch_size=largest, reason="larger ones do not give the same bits here")
        if on_ready is not None:
            on_ready(server.endpoint)
        with torch.inference_mode():  # of the loop's thread, once: each short run would be longer by it
            await server.serve()
        stats = server.engine.stats
        log.info(
            "stopped",
            frames=stats.frames_total,
            batches=stats.batches_total,
            messages_unanswered=server.unanswered_messages,
        )
    if server.failure is not None:
        return 1
    return 130 if signals > 1 else 0


def _recovered(recovery: Recovery | None) -> dict[str, object]:
    if recovery is None:
        return {}
    return {
        "streams_recovered": recovery.streams,
        "frames_replayed": recovery.frames,
        "recovery_s": round(recovery.seconds, 4),
    }


def run(
    config: Config,
    *,
    on_ready: Callable[[str], None] | None = None,
    accept_numerics_change: bool = False,
    warnings: Sequence[str] = (),
) -> int:
    """Serve until interrupted.

    Args:
        config: the configuration.
        on_ready: called with the endpoint once the socket is bound.
        accept_numerics_change: whether to go on with a recording although floats may come out with other bits now.
        warnings: what to say of the configuration, as sentences.

    Returns:
        0 after a clean end, 1 after a failure while serving, 130 when a second interrupt forced the end.

    Raises:
        CannotServe: when the server cannot start.
    """
    prepared = prepare(config)
    compiled_s = _compile()
    gc.freeze()  # what is loaded by now stays: collections need not look at it again
    return asyncio.run(_serve(config, prepared, compiled_s, on_ready, accept_numerics_change, warnings))


def _compile() -> float:
    """Compile the hot path, or load it from its cache; the seconds that took. People are told what they wait for."""
    if sys.stderr.isatty() and not are_cached():
        sys.stderr.write("Compiling the hot path: once on a machine, some ten seconds.\n")
    began = time.perf_counter()
    warm_up()
    return time.perf_counter() - began
