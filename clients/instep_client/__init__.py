"""instep's client: streams of frames to a server that steps a recurrent network for all of them at once.

Each name is imported when it is first used, so a command can be interrupted from its first moment, and a program that
needs only a part does not wait for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instep_client.aio import AsyncClient as AsyncClient
    from instep_client.aio import AsyncGroup as AsyncGroup
    from instep_client.aio import AsyncStream as AsyncStream
    from instep_client.frames import TimedOutputs as TimedOutputs
    from instep_client.protocol.codes import Code as Code
    from instep_client.protocol.errors import ClientClosed as ClientClosed
    from instep_client.protocol.errors import ConnectionFailed as ConnectionFailed
    from instep_client.protocol.errors import ConnectionRefused as ConnectionRefused
    from instep_client.protocol.errors import DataLoss as DataLoss
    from instep_client.protocol.errors import FrameFailure as FrameFailure
    from instep_client.protocol.errors import FramesRefused as FramesRefused
    from instep_client.protocol.errors import HandshakeFailed as HandshakeFailed
    from instep_client.protocol.errors import InstepError as InstepError
    from instep_client.protocol.errors import InvalidInput as InvalidInput
    from instep_client.protocol.errors import MalformedMessage as MalformedMessage
    from instep_client.protocol.errors import Refused as Refused
    from instep_client.protocol.errors import StepTimeout as StepTimeout
    from instep_client.protocol.errors import StreamEvicted as StreamEvicted
    from instep_client.protocol.errors import StreamRefused as StreamRefused
    from instep_client.protocol.wire import ServerInfo as ServerInfo
    from instep_client.replies import ListedStream as ListedStream
    from instep_client.replies import ServedModel as ServedModel
    from instep_client.states import StreamSnapshot as StreamSnapshot
    from instep_client.sync import Client as Client
    from instep_client.sync import Group as Group
    from instep_client.sync import Stream as Stream

    __all__: list[str]
else:
    _NAMES = {
        "aio": "AsyncClient AsyncGroup AsyncStream",
        "frames": "TimedOutputs",
        "protocol.codes": "Code",
        "protocol.errors": "ClientClosed ConnectionFailed ConnectionRefused DataLoss FrameFailure FramesRefused "
        "HandshakeFailed InstepError InvalidInput MalformedMessage Refused StepTimeout StreamEvicted StreamRefused",
        "protocol.wire": "ServerInfo",
        "replies": "ListedStream ServedModel",
        "states": "StreamSnapshot",
        "sync": "Client Group Stream",
    }
    _HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
    __all__ = sorted(_HOMES)

    def __dir__() -> list[str]:
        return __all__

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"instep_client.{_HOMES[name]}"), name)
