"""Combinations of values that contradict each other, though each value alone is fine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from instep.config.endpoint import host_and_port, is_loopback, is_loopback_host

if TYPE_CHECKING:
    from instep.config.sections import Config


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Keys that do not go together: `paths[0]` is the one to change first."""

    paths: tuple[str, ...]
    message: str
    suggestion: str


def contradictions(config: Config) -> list[Contradiction]:
    """Everything in the configuration that cannot work together.

    `max_batch_size` above `max_streams` is none of it: such a batch is merely never full.
    """
    return [
        *_transport(config),
        *_http(config),
        *_limits(config),
        *_recording(config),
        *_verify(config),
        *_shadow(config),
    ]


def _transport(config: Config) -> list[Contradiction]:
    transport = config.transport
    if is_loopback(transport.endpoint) or transport.allow_plaintext:
        return []
    return [
        Contradiction(
            ("transport.endpoint", "transport.allow_plaintext"),
            f"{transport.endpoint} can be reached from other machines, and there is no encryption and no check of "
            "who connects yet: anybody on that network could read the streams and send frames",
            "use tcp://127.0.0.1:PORT, or set transport.allow_plaintext: true (--allow-plaintext) if you trust that "
            "network",
        )
    ]


def _http(config: Config) -> list[Contradiction]:
    endpoint = config.http.endpoint
    if endpoint is None or config.http.token_file is not None or is_loopback_host(host_and_port(endpoint)[0]):
        return []
    return [
        Contradiction(
            ("http.endpoint", "http.token_file"),
            f"{endpoint} can be reached from other machines: anybody on that network could read the names, rates and "
            "values of the streams",
            "use 127.0.0.1:PORT, or name a file that holds a token in http.token_file",
        )
    ]


def _limits(config: Config) -> list[Contradiction]:
    limits = config.limits
    found = []
    if limits.credit_frames > limits.max_pending_frames:
        found.append(
            Contradiction(
                ("limits.credit_frames", "limits.max_pending_frames"),
                f"one connection is promised {limits.credit_frames} frames in flight, but the whole server holds "
                f"at most limits.max_pending_frames = {limits.max_pending_frames}",
                f"set it to at most {limits.max_pending_frames}, or raise limits.max_pending_frames",
            )
        )
    if limits.max_block_frames > limits.credit_frames:
        found.append(
            Contradiction(
                ("limits.max_block_frames", "limits.credit_frames"),
                f"a block of {limits.max_block_frames} frames could never be sent, because one connection may have "
                f"only limits.credit_frames = {limits.credit_frames} in flight",
                f"set it to at most {limits.credit_frames}, or raise limits.credit_frames",
            )
        )
    if 0 < limits.max_idle_s < limits.first_frame_s:
        found.append(
            Contradiction(
                ("limits.first_frame_s", "limits.max_idle_s"),
                f"a stream would have {limits.first_frame_s:g} s to send its first frame, but is evicted as idle after "
                f"limits.max_idle_s = {limits.max_idle_s:g} s",
                f"set it to at most {limits.max_idle_s:g}, or raise limits.max_idle_s, or set that to 0 for never",
            )
        )
    return found


def _recording(config: Config) -> list[Contradiction]:
    if config.recording.file is not None:
        return []
    return [
        Contradiction(
            (f"recording.{key}", "recording.file"),
            f"recording.{key} trims a recording, and nothing is recorded",
            "name a recording.file (--record FILE), or set this to 0",
        )
        for key in ("keep_bytes", "keep_s")
        if getattr(config.recording, key)
    ]


def _verify(config: Config) -> list[Contradiction]:
    if not config.verify.live:
        return []
    found = []
    if config.recording.file is None:
        found.append(
            Contradiction(
                ("verify.live", "recording.file"),
                "live verification replays the recording, and nothing is recorded",
                "name a recording.file (--record FILE), or set this to false",
            )
        )
    if config.engine.exactness == "off":
        found.append(
            Contradiction(
                ("verify.live", "engine.exactness"),
                "live verification compares frames with what certification promises of them, and engine.exactness is "
                "off",
                "set engine.exactness to prefer or require, or set this to false",
            )
        )
    return found


def _shadow(config: Config) -> list[Contradiction]:
    model = config.model
    if model.shadow is None:
        return []
    found = []
    if config.recording.file is None:
        found.append(
            Contradiction(
                ("model.shadow", "recording.file"),
                "a candidate is compared with what the recording holds, and nothing is recorded",
                "name a recording.file (--record FILE), or leave this out",
            )
        )
    if not isinstance(model.shadow, dict) and len(model.folders) > 1:
        found.append(
            Contradiction(
                ("model.shadow", "model.folder"),
                f"there are {len(model.folders)} models, and {model.shadow} is not said to be for one of them",
                f"write {{NAME: {model.shadow}}} with the name of the model",
            )
        )
    return found
