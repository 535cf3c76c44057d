"""Functions of libzmq, called by compiled code on the sockets that pyzmq has made.

Pointers are integers: `Socket.underlying`, `array.ctypes.data`, and what `message_data` returns. A message part is 64
bytes of memory (`new_message`), which each receive empties first. No function waits unless its flags say so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
import zmq
from numba.core import types
from zmq.backend.cython import _zmq

from instep.core.typing import U8
from instep.frontends import CannotListen

DONTWAIT: Final = int(zmq.DONTWAIT)
SNDMORE: Final = int(zmq.SNDMORE)
POLL_ITEM: Final = np.dtype([("socket", "<i8"), ("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
"""`zmq_pollitem_t`."""
PollItems: TypeAlias = npt.NDArray[Any]

_INT, _POINTER = (types.intc, ctypes.c_int), (types.intp, ctypes.c_ssize_t)
_jit: Final[Any] = numba.config


def _library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(_zmq.__file__)  # finds what is in the libraries of pyzmq's module, too
    return library if hasattr(library, "zmq_msg_recv") else None


_LIBRARY: Final = _library()


def _missing(*_: object) -> int:
    raise CannotListen(
        "this pyzmq was built without a shared libzmq, which compiled code calls; install the one that is ready: "
        "pip install --force-reinstall --only-binary :all: pyzmq"
    )


def _for_python(name: str, result: tuple[Any, Any], *arguments: tuple[Any, Any]) -> Callable[..., int]:
    if _LIBRARY is None:
        return _missing
    function = (_LIBRARY if name.startswith("zmq_") else ctypes.CDLL(None))[name]  # an object of its own each time
    function.restype, function.argtypes = result[1], [each for _, each in arguments]
    return cast(Callable[..., int], function)


def _function(name: str, result: tuple[Any, Any], *arguments: tuple[Any, Any]) -> Callable[..., int]:
    function = _for_python(name, result, *arguments)
    if _jit.DISABLE_JIT:
        return lambda *values: function(*map(int, values))
    if _LIBRARY is not None:  # by name, and not by address, so that compiled code can be cached
        llvm.add_symbol(name, ctypes.cast(cast(Any, function), ctypes.c_void_p).value)
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


# ── For Python ────────────────────────────────────────────────────────────────────────────────────────────────────────

_init = _for_python("zmq_msg_init", _INT, _POINTER)
_close = _for_python("zmq_msg_close", _INT, _POINTER)
_data = _for_python("zmq_msg_data", _POINTER, _POINTER)
_size = _for_python("zmq_msg_size", _POINTER, _POINTER)
_more = _for_python("zmq_msg_more", _INT, _POINTER)
_get = _for_python("zmq_msg_get", _INT, _POINTER, _INT)
_gets = _for_python("zmq_msg_gets", _POINTER, _POINTER, (None, ctypes.c_char_p))


def new_message() -> U8:
    """The memory of an empty message part."""
    memory = np.zeros(64, np.uint8)
    _init(memory.ctypes.data)
    return memory


def free_message(message: U8) -> None:
    """Release the contents of a message part."""
    _close(message.ctypes.data)


def bytes_of(message: U8) -> bytes:
    """A copy of the contents of a message part."""
    address = message.ctypes.data
    return ctypes.string_at(_data(address), _size(address))


def is_last(message: U8) -> bool:
    """Whether no further part of the message follows."""
    return not _more(message.ctypes.data)


def descriptor_of(message: U8) -> int:
    """The descriptor of the connection from which it came."""
    return _get(message.ctypes.data, int(zmq.SRCFD))


def property_of(message: U8, name: str) -> str:
    """A property of the connection from which it came (`zmq_msg_gets`); empty if it has none."""
    address = _gets(message.ctypes.data, name.encode())
    return ctypes.string_at(address).decode() if address else ""


def poll_items(sockets: list[zmq.Socket[bytes]]) -> PollItems:
    """POLL_ITEM [N] for messages that have arrived."""
    items = np.zeros(len(sockets), POLL_ITEM)
    items["socket"] = [socket.underlying for socket in sockets]
    items["events"] = int(zmq.POLLIN)
    return items
