"""instep's client: streams of frames to a server that steps a recurrent network for all of them at once."""

from instep_client.aio import AsyncClient, AsyncGroup, AsyncStream
from instep_client.calls import Answer
from instep_client.errors import (
    ClientClosed,
    ConnectionFailed,
    FrameFailure,
    FramesRefused,
    InstepError,
    InvalidInput,
    MalformedMessage,
    Refused,
    StreamEvicted,
    StreamRefused,
)
from instep_client.sync import Client, Group, Stream
from instep_client.wire import Code, ServerInfo

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncGroup",
    "AsyncStream",
    "Client",
    "ClientClosed",
    "Code",
    "ConnectionFailed",
    "FrameFailure",
    "FramesRefused",
    "Group",
    "InstepError",
    "InvalidInput",
    "MalformedMessage",
    "Refused",
    "ServerInfo",
    "Stream",
    "StreamEvicted",
    "StreamRefused",
]
