"""instep's client: streams of frames to a server that steps a recurrent network for all of them at once.

What is named here is imported when it is first asked for: a command can so be interrupted from its first moment, and
those that need only a part do not wait for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "AsyncClient",
    "AsyncGroup",
    "AsyncStream",
    "Client",
    "ClientClosed",
    "Code",
    "ConnectionFailed",
    "ConnectionRefused",
    "DataLoss",
    "FrameFailure",
    "FramesRefused",
    "Group",
    "InstepError",
    "InvalidInput",
    "ListedStream",
    "MalformedMessage",
    "Refused",
    "ServedModel",
    "ServerInfo",
    "Stream",
    "StreamEvicted",
    "StreamRefused",
    "StreamSnapshot",
    "TimedOutputs",
]

if TYPE_CHECKING:
    from instep_client.aio import AsyncClient, AsyncGroup, AsyncStream
    from instep_client.frames import TimedOutputs
    from instep_client.protocol.errors import (
        ClientClosed,
        ConnectionFailed,
        ConnectionRefused,
        DataLoss,
        FrameFailure,
        FramesRefused,
        InstepError,
        InvalidInput,
        MalformedMessage,
        Refused,
        StreamEvicted,
        StreamRefused,
    )
    from instep_client.protocol.wire import Code, ServerInfo
    from instep_client.replies import ListedStream, ServedModel
    from instep_client.snapshots import StreamSnapshot
    from instep_client.sync import Client, Group, Stream
else:
    _NAMES = {
        "aio": ["AsyncClient", "AsyncGroup", "AsyncStream"],
        "frames": ["TimedOutputs"],
        "protocol.wire": ["Code", "ServerInfo"],
        "replies": ["ListedStream", "ServedModel"],
        "snapshots": ["StreamSnapshot"],
        "sync": ["Client", "Group", "Stream"],
    }
    _HOMES = {name: home for home, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"instep_client.{_HOMES.get(name, 'protocol.errors')}"), name)
