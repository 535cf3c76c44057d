"""Requests to load, swap and unload models, and who does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from instep.frontends.zmq.decode import text
from instep.streaming.api import Refusal
from instep.streaming.tasks import Tasks
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Header, Kind, Streams, SwapPolicy


class Operator(Protocol):
    """Loads, swaps and unloads models; raises Refusal."""

    tasks: Tasks

    @property
    def is_busy(self) -> bool:
        """Whether a change of models is under way, or waits for its turn."""

    async def load(self, name: str, folder: Path) -> None:
        """Serve another model."""

    async def swap(self, name: str, folder: Path, policy: SwapPolicy) -> None:
        """Serve another version of a model, with its streams or without them."""

    async def unload(self, name: str, *, force: bool) -> None:
        """Serve a model no longer, if none of its streams is in use, or although some are."""


async def operate(operator: Operator, header: Header, own: str, find: Callable[[str], str]) -> None:
    """Load, swap or unload a model as LOAD, SWAP or UNLOAD asks; raises MalformedMessage or Refusal.

    The request came over a connection to the model `own`. `find` gives the name of a model that is served, or refuses.
    """
    name = text(header.fields[0], "the model's name")
    if header.kind is Kind.LOAD:
        await operator.load(name, _folder(header.fields[1]))
    elif header.kind is Kind.SWAP:
        await operator.swap(find(name), _folder(header.fields[1]), _policy(*header.fields[2:]))
    elif name == own:
        raise Refusal(Code.NOT_ALLOWED, "unload a model over a connection to another one; load that first")
    else:
        force = wire.count_field(header.fields[1], "whether to end streams", 1, at_least=0)
        await operator.unload(find(name), force=bool(force))


def _folder(value: object) -> Path:
    """The field of LOAD and SWAP."""
    folder = Path(text(value, "the folder"))
    if not folder.is_absolute():
        raise Refusal(Code.NOT_LOADED, f"{str(folder)!r:.120} is relative: name the folder by its absolute path")
    return folder


def _policy(streams: object, frames: object) -> SwapPolicy:
    """The last two fields of SWAP."""
    policy = Streams(wire.count_field(streams, "what becomes of the streams", max(Streams), at_least=0))
    replays = policy is Streams.REPLAY
    most, least = (wire.MAX_REPLAY_FRAMES, 1) if replays else (0, 0)
    return SwapPolicy(policy, wire.count_field(frames, "the frames to replay", most, least))
