"""What a server begins with."""

from __future__ import annotations

from dataclasses import dataclass

from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.server.limits import EffectiveLimits


@dataclass(slots=True)
class Streams:
    """The streams that a server begins with."""

    limits: EffectiveLimits
    table: StreamTable
    rings: Rings
    last_stream: int = 0
    """The highest number of a stream in the recording."""
