"""The sections and keys of the configuration, with their types, bounds and defaults.

`configs/default.yaml` explains each key; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from instep.config.endpoint import checked_endpoint, checked_http_endpoint, host_and_port, is_loopback, is_loopback_host

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Bytes = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
TimerSeconds = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
"""A timer of libzmq: above 0, and within its 16-bit deciseconds."""
NO_RECORDING: Final = (
    "it needs a recording, and nothing is recorded: name a recording.path (--record PATH), or leave it out"
)
ONE_FILE: Final = (
    "recording.path is one file, and each model and each version of one needs its own: start the server with --record "
    "FOLDER, which is made"
)
_DEVICE: Final = r"^(auto|cpu|cuda(:([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?)$"
"""PyTorch keeps the index in a signed byte, so cuda:256 would be cuda:0."""


def _lowered(word: object) -> object:
    return word.lower() if isinstance(word, str) else word


class Section(BaseModel):
    """The base of all sections: frozen, without unlisted keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """`keep_bytes: yes` would be one byte to pydantic."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise ValueError(f"expected a number, not {'yes or true' if value else 'no or false'}")
        return value

    def _contradictions(self) -> Iterator[str]:
        """A line `section.key: why` for each value that contradicts another."""
        return iter(())

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if lines := list(self._contradictions()):
            raise ValueError("\n".join(lines))
        return self


class StreamPolicy(NamedTuple):
    """How a model's open streams continue when its version changes: `keep`, `move` or `replay:N`."""

    word: Literal["keep", "move", "replay"]
    frames: int = 0
    """For `replay`, the number of newest frames that are replayed for each stream."""

    @classmethod
    def parse(cls, text: str) -> StreamPolicy:
        """Parse a checked `model.on_reload`."""
        word, _, frames = text.partition(":")
        return cls(cast(Any, word), int(frames or 0))


class ModelConfig(Section):
    """The model to serve, or several: a list of their folders, or the folders by the names that the models get."""

    folder: Annotated[
        Path
        | Annotated[tuple[Path, ...], Field(min_length=1)]
        | Annotated[dict[str, Path], Field(min_length=1)]
        | None,
        Field(description="a folder or several, as [A, B] or {NAME: A, OTHER: B}"),
    ] = None
    on_reload: Annotated[
        str,
        BeforeValidator(_lowered),
        Field(pattern=r"^(keep|move|replay:[1-9][0-9]{0,8})$", description="keep, move or replay:N, as replay:256"),
    ] = "keep"
    allow_other_sizes: bool = False

    @property
    def folders(self) -> list[tuple[str | None, Path]]:
        """The folder of each model, and the name that replaces the one in its model.yaml, if any."""
        if self.folder is None:
            return []
        if isinstance(self.folder, Path):
            return [(None, self.folder)]
        return list(self.folder.items()) if isinstance(self.folder, dict) else [(None, each) for each in self.folder]


class EngineConfig(Section):
    """Where and how the network is stepped."""

    device: Annotated[str, Field(pattern=_DEVICE, description="auto, cpu, cuda, or cuda:0 to cuda:127")] = "auto"
    max_streams: Count = 4096
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 512
    max_queue_delay_us: Annotated[int, Field(ge=0, le=10_000_000)] = 0


class TransportConfig(Section):
    """The ZeroMQ socket."""

    endpoint: Annotated[str, AfterValidator(checked_endpoint)] = "tcp://127.0.0.1:5757"
    key_file: Path | None = None
    peers_file: Path | None = None
    allow_plaintext: bool = False
    max_message_bytes: Annotated[int, Field(ge=4096, le=2**31 - 1)] = 16 * 1024 * 1024
    handshake_timeout_s: TimerSeconds = 30.0
    heartbeat_s: TimerSeconds = 10.0

    def _contradictions(self) -> Iterator[str]:
        if (self.key_file is None) != (self.peers_file is None):
            yield "transport.key_file: give it and transport.peers_file, or neither: see docs/security.md"
        elif not is_loopback(self.endpoint) and not self.allow_plaintext and self.key_file is None:
            yield (
                f"transport.endpoint: {self.endpoint} can be reached from other machines, and without keys anybody on "
                "that network could read the streams and send frames; make keys (docs/security.md), use "
                "tcp://127.0.0.1:PORT, or set transport.allow_plaintext: true if you trust that network"
            )


class HttpConfig(Section):
    """The admin server; it is off without an endpoint."""

    endpoint: Annotated[str | None, BeforeValidator(checked_http_endpoint)] = "127.0.0.1:5780"
    token_file: Path | None = None

    def _contradictions(self) -> Iterator[str]:
        if self.endpoint and self.token_file is None and not is_loopback_host(host_and_port(self.endpoint)[0]):
            yield (
                f"http.endpoint: {self.endpoint} can be reached from other machines: anybody on that network could "
                "read the names, rates and values of the streams; use 127.0.0.1:PORT, or name a file that holds a "
                "token in http.token_file"
            )


class LimitsConfig(Section):
    """Limits at which a message is refused, a silent peer given up, and an idle stream closed."""

    max_idle_s: Seconds = 3600.0
    park_s: Seconds = 300.0
    max_parked_streams: Count = 4096
    hibernate_after_s: Seconds = 60.0
    window_frames: Annotated[int, Field(ge=1, le=65_536)] = 32
    max_block_frames: Count = 16_384
    max_pending_frames: Count = 131_072
    credit_frames: Count = 16_384
    max_connections: Count = 16_384

    def _contradictions(self) -> Iterator[str]:
        if self.credit_frames > self.max_pending_frames:
            yield (
                f"limits.credit_frames: one connection is promised {self.credit_frames} frames in flight, but the "
                f"whole server holds at most limits.max_pending_frames = {self.max_pending_frames}: raise that or "
                "lower this"
            )
        if self.max_block_frames > self.credit_frames:
            yield (
                f"limits.max_block_frames: a block of {self.max_block_frames} frames could never be sent, because one "
                f"connection may have only limits.credit_frames = {self.credit_frames} in flight: raise that or lower "
                "this"
            )


class RecordingConfig(Section):
    """The recording; without a path nothing is recorded."""

    path: Path | None = None
    durability: Literal["memory", "commit", "fsync"] = "commit"
    recovery_target_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    keep_bytes: Bytes = 0
    keep_s: Seconds = 0.0
    warn_free_bytes: Bytes = 1024 * 1024 * 1024

    @property
    def is_one_file(self) -> bool:
        """Whether the path, which ends in .instep, is that of the only file; any other path is a folder's."""
        return self.path is not None and self.path.name.endswith(".instep")

    def _contradictions(self) -> Iterator[str]:
        if self.path is None:
            asked = {"keep_bytes": self.keep_bytes, "keep_s": self.keep_s, "durability": self.durability == "fsync"}
            yield from (f"recording.{key}: {NO_RECORDING}" for key, is_asked in asked.items() if is_asked)


class VerifyConfig(Section):
    """Live verification of recordings."""

    live: bool = False


class ShutdownConfig(Section):
    """How the server ends."""

    drain_timeout_s: Seconds = 30.0


class LogConfig(Section):
    """The level, the form and the place of the log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lowered)] = "info"
    format: Annotated[Literal["console", "json"], BeforeValidator(_lowered)] = "console"
    file: Path | None = None
    summary_s: Seconds = 10.0


class AuditConfig(Section):
    """The audit; no file means none is written."""

    file: Path | None = None


class ClusterConfig(Section):
    """A cluster: how long silence is waited for, and what a shard may do without."""

    key_file: Path | None = None
    dead_s: Annotated[float, Field(ge=0.5, le=3600)] = 3.0
    copy_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 2.0
    needs_copy: bool = False
    accept_numerics_change: bool = False


class Config(Section):
    """The complete configuration; one that contradicts itself cannot be made."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    transport: TransportConfig = TransportConfig()
    http: HttpConfig = HttpConfig()
    limits: LimitsConfig = LimitsConfig()
    recording: RecordingConfig = RecordingConfig()
    verify: VerifyConfig = VerifyConfig()
    shutdown: ShutdownConfig = ShutdownConfig()
    log: LogConfig = LogConfig()
    audit: AuditConfig = AuditConfig()
    cluster: ClusterConfig = ClusterConfig()

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """This with other values by `section.key`, which are valid and are not checked."""
        config = self
        for path, value in values.items():
            name, key = path.split(".")
            config = config.model_copy(update={name: getattr(config, name).model_copy(update={key: value})})
        return config

    def of_shard(self, number: int) -> Config:
        """That of one of several servers: the next ports in a row, or ipc://PATH.NUMBER, and folders for recordings."""
        endpoint, folder = self.transport.endpoint, self.recording.path
        place, _, port = endpoint.rpartition(":")
        if endpoint.startswith("ipc:"):
            endpoint = f"{endpoint}.{number}"
        elif port.isdecimal():
            endpoint = f"{place}:{int(port) + number}"
        folder = folder and folder / f"shard-{number}"
        return self.with_values({"transport.endpoint": endpoint, "recording.path": folder})

    @property
    def node_transport(self) -> TransportConfig:
        """The transport between nodes and the directory, where each has keys of its own."""
        own = self.cluster.key_file or self.transport.key_file
        return self.transport.model_copy(update={"key_file": own})

    def _contradictions(self) -> Iterator[str]:
        if self.verify.live and self.recording.path is None:
            yield f"verify.live: {NO_RECORDING}"
        if self.recording.is_one_file and self.model.on_reload != "keep":
            yield f"model.on_reload: {ONE_FILE}"
        if self.recording.is_one_file and len(self.model.folders) > 1:
            yield f"recording.path: {ONE_FILE}"
