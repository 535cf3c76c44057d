"""Limits of the configuration as the engine takes them, some of them fitted to the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from instep.config import Config
from instep.server.preparation import CannotServe
from instep.streaming.hibernation import IdleLimits

_FLOAT32_BYTES = 4
_ENVELOPE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """The limits that may be smaller for a model than they are configured."""

    max_block_frames: int
    credit_frames: int


def effective_limits(config: Config, features: int, outputs: int) -> EffectiveLimits:
    """Fit the limits of the configuration to a model.

    A block's frames and their answer must both fit into one message of `transport.max_message_bytes`; a connection's
    credit is bounded by the bytes its unread answers may take.

    Raises:
        CannotServe: when not even one frame fits.
    """
    width_bytes = max(features, outputs) * _FLOAT32_BYTES
    fitting = (config.transport.max_message_bytes - _ENVELOPE_BYTES) // (width_bytes + 24)
    if fitting < 1:
        raise CannotServe(
            f"transport.max_message_bytes is {config.transport.max_message_bytes}, but one frame of this model takes "
            f"{width_bytes + 24} bytes and {_ENVELOPE_BYTES} more; raise it"
        )
    return EffectiveLimits(
        max_block_frames=min(config.limits.max_block_frames, fitting),
        credit_frames=min(config.limits.credit_frames, 2 * fitting),
    )


def idle_limits(config: Config) -> IdleLimits:
    """When streams that do nothing leave memory, and when they end."""
    limits = config.limits
    return IdleLimits(
        round(limits.max_idle_s * 1e9),
        round(limits.park_s * 1e9),
        limits.max_parked_streams,
        round(limits.hibernate_after_s * 1e9),
    )
