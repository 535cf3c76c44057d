"""From a configuration to a running server, and its exit status."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import structlog
import torch
import zmq

from instep.config import Config
from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.model.certify import Certification, candidate_buckets, certify
from instep.model.errors import ModelError
from instep.model.folder import Model, load_model, model_from_parts
from instep.model.network import Network
from instep.model.numerics import numerics
from instep.model.numerics import prepare as prepare_numerics
from instep.recording.errors import RecordingError
from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.server.limits import LimitsError, effective_limits
from instep.server.log import make_log
from instep.server.open_files import allow_open_files
from instep.server.recovery import Recovery, go_on
from instep.server.server import Server, Streams
from instep.server.signals import interrupts_call
from instep.server.transport import Router
from instep_client.wire import PROTOCOL_VERSION, ServerInfo

_FILES_BESIDE_CONNECTIONS = 100


class CannotServe(Exception):
    """The server cannot start; the message says whose fault it is and what to do."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is decided before the socket is bound."""

    model: Model
    model_path: Path
    network: Network
    device: torch.device
    certification: Certification


def demo_model_folder() -> Path:
    """The model that ships with the package, served when none is named."""
    return Path(str(files("instep.demo") / "model"))


def prepare(config: Config) -> Prepared:
    """Load and check the model, choose the device, certify.

    Raises:
        CannotServe: with a sentence.
    """
    prepare_numerics(config.engine.threads)
    try:
        model, path = _load(config)
    except ModelError as error:
        raise CannotServe(str(error)) from None
    device = _device(config.engine.device)
    network = Network(model, device)
    buckets = candidate_buckets(network, config.engine.max_batch_size)
    if config.engine.exactness == "off":
        certification = Certification("off", buckets, max_ulp=0, whole_sequence=False)
    else:
        certification = certify(network, buckets)
    if config.engine.exactness == "require" and certification.exactness != "exact":
        raise CannotServe(
            f"engine.exactness is `require`, but on this machine batches differ from one another: up to "
            f"{certification.max_ulp} ULP were seen in one step; `prefer` serves all the same, and says so"
        )
    return Prepared(model, path, network, device, certification)


def _load(config: Config) -> tuple[Model, Path]:
    if config.model.network is not None and config.model.weights is not None:
        weights = config.model.weights
        return model_from_parts(config.model.network, weights, weights.stem), weights.resolve()
    folder = config.model.folder or demo_model_folder()
    return load_model(folder), folder.resolve()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotServe(f"engine.device is {name}, but torch finds no CUDA device here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotServe(f"engine.device is {name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def recording_header(prepared: Prepared, config: Config) -> RecordingHeader:
    """What a recording of this server says of it."""
    certification = prepared.certification
    return RecordingHeader(
        instep_version=version("instep"),
        created_ns=time.time_ns(),
        model_name=prepared.model.name,
        model_folder=str(prepared.model_path),
        description=prepared.model.description.model_dump(mode="json"),
        model_fingerprint=prepared.model.fingerprint,
        numerics=numerics(prepared.network),
        exactness=certification.exactness,
        buckets=certification.buckets,
        max_ulp=certification.max_ulp,
        durability=config.recording.durability,
    )


def server_info(config: Config, prepared: Prepared) -> ServerInfo:
    """What WELCOME says."""
    network, certification = prepared.network, prepared.certification
    limits = effective_limits(config, certification.buckets[-1], network.features, network.outputs)
    return ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=secrets.token_hex(8),
        model=prepared.model.name,
        fingerprint=prepared.model.fingerprint,
        features=network.features,
        outputs=network.outputs,
        state_layers=network.state_layers,
        state_size=network.state_size,
        device=str(prepared.device),
        exactness=certification.exactness,
        buckets=certification.buckets,
        max_streams=limits.max_streams,
        max_message_bytes=limits.max_message_bytes,
        max_block_frames=limits.max_block_frames,
        credit_frames=limits.credit_frames,
        max_idle_s=config.limits.max_idle_s,
        window_frames=limits.window_frames,
        durability="memory" if config.recording.file is None else config.recording.durability,
        park_s=config.limits.park_s,
    )


def make_server(
    config: Config,
    prepared: Prepared,
    log: structlog.stdlib.BoundLogger,
    stepper: Stepper | None = None,
    *,
    accept_numerics_change: bool = False,
) -> Server:
    """A server that is bound and not yet serving; called inside the event loop.

    Args:
        config: the configuration.
        prepared: what `prepare` made of it.
        log: where the server says what it does.
        stepper: another one than usual, for tests.
        accept_numerics_change: whether to go on with a recording although floats may come out with other bits now.

    Raises:
        CannotServe: when the endpoint, the recording, the limits or the memory do not allow it.
    """
    network, certification = prepared.network, prepared.certification
    writer, recovery = None, None
    with ExitStack() as undo:
        try:
            info = server_info(config, prepared)
            if stepper is None:
                engine = config.engine
                stepper = Stepper(
                    network, certification.buckets, engine.max_streams, prepared.device, engine.device_streams
                )
            streams = _streams(config, prepared)
            router = Router(config.transport)
            undo.callback(router.close)
            if config.recording.file is not None:
                writer, recovery = _recording(config, prepared, streams, stepper, accept_numerics_change)
                undo.callback(writer.abandon)
            server = Server(config, network, certification, router, stepper, info, streams, writer, log)
        except (LimitsError, RecordingError) as error:
            raise CannotServe(str(error)) from None
        except (MemoryError, RuntimeError) as error:  # torch's own kind is the latter
            raise _no_memory(config, error) from None
        except zmq.ZMQError as error:
            raise CannotServe(
                f"cannot bind {config.transport.endpoint}: {error}; is another server using it?"
            ) from None
        undo.pop_all()
    server.statistics.tiers = stepper.tiers
    server.recovery = recovery
    return server


def _streams(config: Config, prepared: Prepared) -> Streams:
    network = prepared.network
    limits = effective_limits(config, prepared.certification.buckets[-1], network.features, network.outputs)
    table = StreamTable(limits.max_streams, limits.max_connections, limits.first_generation, time.time_ns())
    rings = Rings(
        table,
        limits.window_frames,
        limits.max_streams,
        network.features,
        network.outputs,
        limits.max_pending_frames,
    )
    return Streams(table, rings)


def _recording(
    config: Config, prepared: Prepared, streams: Streams, stepper: Stepper, accept_numerics_change: bool
) -> tuple[RecordingWriter, Recovery | None]:
    """A new recording, or the one that is there, with its streams put back."""
    path = config.recording.file
    assert path is not None
    header = recording_header(prepared, config)
    if not path.exists() or path.stat().st_size == 0:
        return RecordingWriter.create(path, header), None
    writer, recovery = go_on(
        path, header, streams.table, streams.rings, stepper, accept_numerics_change=accept_numerics_change
    )
    streams.last_stream = recovery.last_stream
    return writer, recovery


def _no_memory(config: Config, error: Exception) -> CannotServe:
    why = (str(error) or type(error).__name__).splitlines()[0]
    return CannotServe(
        f"no memory for engine.max_streams = {config.engine.max_streams} and limits.max_pending_frames = "
        f"{config.limits.max_pending_frames}; lower one of them ({why})"
    )


def exactness_sentence(certification: Certification) -> str:
    """`exact in buckets 4 … 256`, `within 3 ULP, …` or `not certified, …`."""
    buckets = f"in buckets {', '.join(map(str, certification.buckets))}"
    if certification.exactness == "exact":
        return f"exact {buckets}"
    if certification.exactness == "tolerance":
        return f"not exact, up to {certification.max_ulp} ULP seen in a step, {buckets}"
    return f"not certified {buckets}"


def _capacity(config: Config) -> str:
    streams, on_device = config.engine.max_streams, config.engine.device_streams
    return f"{streams} streams" + (f", {on_device} on the device at once" if 0 < on_device < streams else "")


async def _serve(
    config: Config, prepared: Prepared, on_ready: Callable[[str], None] | None, accept_numerics_change: bool
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
            capacity=_capacity(config),
            exactness=exactness_sentence(prepared.certification),
            recording=str(config.recording.file or "none"),
            durability=server.info.durability,
            **_recovered(server.recovery),
        )
        largest = prepared.certification.buckets[-1]
        if largest < config.engine.max_batch_size:
            log.warning("smaller batches", max_batch_size=largest, reason="larger ones do not give the same bits here")
        if on_ready is not None:
            on_ready(server.endpoint)
        await server.serve()
        statistics = server.statistics
        log.info(
            "stopped",
            frames=statistics.frames_total,
            batches=statistics.batches_total,
            blocks_unanswered=server.unanswered_blocks,
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


def run(config: Config, *, on_ready: Callable[[str], None] | None = None, accept_numerics_change: bool = False) -> int:
    """Serve until interrupted.

    Args:
        config: the configuration.
        on_ready: called with the endpoint once the socket is bound.
        accept_numerics_change: whether to go on with a recording although floats may come out with other bits now.

    Returns:
        0 after a clean end, 1 after a failure while serving, 130 when a second interrupt forced the end.

    Raises:
        CannotServe: when the server cannot start.
    """
    prepared = prepare(config)
    gc.freeze()  # what is loaded by now stays: collections need not look at it again
    return asyncio.run(_serve(config, prepared, on_ready, accept_numerics_change))
