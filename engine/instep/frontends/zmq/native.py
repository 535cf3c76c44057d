"""Functions of libzmq, called by compiled code on the sockets that pyzmq has made.

Pointers are integers: `Socket.underlying`, `array.ctypes.data`, and what `message_data` returns. A message part is 64
bytes of memory (`new_message`), which each receive empties first. No function waits unless its flags say so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
import zmq
from numba.core import types
from zmq.backend.cython import _zmq

from instep.core.typing import U8

DONTWAIT: Final = int(zmq.DONTWAIT)
SNDMORE: Final = int(zmq.SNDMORE)
POLL_ITEM: Final = np.dtype([("socket", "<i8"), ("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
"""`zmq_pollitem_t`."""
PollItems: TypeAlias = npt.NDArray[Any]

_INT, _POINTER = (types.intc, ctypes.c_int), (types.intp, ctypes.c_ssize_t)
_jit: Final[Any] = numba.config


class NoSharedLibrary(Exception):
    """pyzmq has no shared libzmq whose functions could be found."""


def _library() -> ctypes.CDLL:
    # Symbols of an extension module's own libraries are found through it.
    library = ctypes.CDLL(_zmq.__file__)
    if not hasattr(library, "zmq_msg_recv"):
        raise NoSharedLibrary(
            "pyzmq was built with a libzmq of its own, which compiled code cannot call; install its wheel: "
            "pip install --force-reinstall --only-binary pyzmq pyzmq"
        )
    return library


_LIBRARY: Final = _library()


def _function(name: str, result: tuple[Any, Any], *arguments: tuple[Any, Any]) -> Callable[..., int]:
    function = getattr(_LIBRARY if name.startswith("zmq_") else ctypes.CDLL(None), name)
    function.restype, function.argtypes = result[1], [each for _, each in arguments]
    if _jit.DISABLE_JIT:
        return lambda *values: function(*map(int, values))
    # By name, and not by address, so that compiled code can be cached.
    llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    external: Callable[..., int] = types.ExternalFunction(name, result[0](*(each for each, _ in arguments)))
    return external


receive_part: Final = _function("zmq_msg_recv", _INT, _POINTER, _POINTER, _INT)
"""Message, socket, flags: the size; negative if there is none."""
message_data: Final = _function("zmq_msg_data", _POINTER, _POINTER)
message_size: Final = _function("zmq_msg_size", _POINTER, _POINTER)
has_more: Final = _function("zmq_msg_more", _INT, _POINTER)
send_part: Final = _function("zmq_send", _INT, _POINTER, _POINTER, _POINTER, _INT)
"""Socket, memory, size, flags: negative if it was not taken. The memory is copied."""
poll: Final = _function("zmq_poll", _INT, _POINTER, _INT, _POINTER)
"""POLL_ITEM [N], N, milliseconds to wait (-1 without end): how many have an event."""
copy_memory: Final = _function("memcpy", _POINTER, _POINTER, _POINTER, _POINTER)
"""To, from, size."""


def new_message() -> U8:
    """The memory of an empty message."""
    memory = np.zeros(64, np.uint8)
    _LIBRARY.zmq_msg_init(ctypes.c_ssize_t(memory.ctypes.data))
    return memory


def poll_items(sockets: list[zmq.Socket[bytes]]) -> PollItems:
    """POLL_ITEM [N] for messages that have arrived."""
    items = np.zeros(len(sockets), POLL_ITEM)
    items["socket"] = [socket.underlying for socket in sockets]
    items["events"] = int(zmq.POLLIN)
    return items
