"""Combinations of values that contradict each other, though each value alone is fine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from instep.config.endpoint import host_and_port, is_loopback, is_loopback_host

if TYPE_CHECKING:
    from instep.config.sections import Config


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Keys that do not go together: `paths[0]` is the one to change first."""

    paths: tuple[str, ...]
    message: str
    suggestion: str


_NEED_A_RECORDING: Final = (
    ("recording.keep_bytes", "recording.keep_bytes trims a recording", "set this to 0"),
    ("recording.keep_s", "recording.keep_s trims a recording", "set this to 0"),
    ("verify.live", "live verification replays the recording", "set this to false"),
)
"""Keys that do something only with a recording: what that is, and how to do without it."""


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Everything in the configuration that cannot work together.

    `max_batch_size` above `max_streams` is none of it: such a batch is merely never full.
    """
    yield from _reachable(config)
    yield from _limits(config)
    for path, why, undo in _NEED_A_RECORDING:
        section, _, key = path.partition(".")
        if config.recording.file is None and getattr(getattr(config, section), key):
            suggestion = f"name a recording.file (--record FILE), or {undo}"
            yield Contradiction((path, "recording.file"), f"{why}, and nothing is recorded", suggestion)


def _reachable(config: Config) -> Iterator[Contradiction]:
    """What other machines can reach without being asked who they are."""
    transport, http = config.transport, config.http
    if not is_loopback(transport.endpoint) and not transport.allow_plaintext:
        yield Contradiction(
            ("transport.endpoint", "transport.allow_plaintext"),
            f"{transport.endpoint} can be reached from other machines, and there is no encryption and no check of "
            "who connects yet: anybody on that network could read the streams and send frames",
            "use tcp://127.0.0.1:PORT, or set transport.allow_plaintext: true (--allow-plaintext) if you trust that "
            "network",
        )
    if http.endpoint and http.token_file is None and not is_loopback_host(host_and_port(http.endpoint)[0]):
        yield Contradiction(
            ("http.endpoint", "http.token_file"),
            f"{http.endpoint} can be reached from other machines: anybody on that network could read the names, rates "
            "and values of the streams",
            "use 127.0.0.1:PORT, or name a file that holds a token in http.token_file",
        )


def _limits(config: Config) -> Iterator[Contradiction]:
    limits = config.limits
    if limits.credit_frames > limits.max_pending_frames:
        yield Contradiction(
            ("limits.credit_frames", "limits.max_pending_frames"),
            f"one connection is promised {limits.credit_frames} frames in flight, but the whole server holds "
            f"at most limits.max_pending_frames = {limits.max_pending_frames}",
            f"set it to at most {limits.max_pending_frames}, or raise limits.max_pending_frames",
        )
    if limits.max_block_frames > limits.credit_frames:
        yield Contradiction(
            ("limits.max_block_frames", "limits.credit_frames"),
            f"a block of {limits.max_block_frames} frames could never be sent, because one connection may have "
            f"only limits.credit_frames = {limits.credit_frames} in flight",
            f"set it to at most {limits.credit_frames}, or raise limits.credit_frames",
        )
