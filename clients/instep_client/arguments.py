"""Users' arguments, checked: arrays, names, endpoints, settings. Every function raises InvalidInput.

Arrays are copied, so that the caller may change them before they are sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import (
    F32,
    MAX_MODEL_NAME_LENGTH,
    MAX_NAME_BYTES,
    U64,
    name_is_good,
)

Indices: TypeAlias = npt.NDArray[np.int64]
NOBODY: Final[Indices] = np.zeros(0, np.int64)

_FLOAT32: Final = np.dtype(np.float32)
_SHOWN: Final = 60
"""The number of characters of a bad name that a message shows."""
_TCP: Final = re.compile(r"tcp://(?P<host>[^\s/*]+):(?P<port>\*|[0-9]{1,5})")
_HTTP: Final = re.compile(r"https?://(?P<host>[^\s/:][^\s/]*?)(:[0-9]*)?(/.*)?")
_ADDRESS: Final = re.compile(r"[^\s:/*]+:[0-9]{1,5}")
EXAMPLES: Final = "tcp://127.0.0.1:5757 or ipc:///path"
DEFAULT_PORT: Final = 5757
"""The default port of the ZeroMQ endpoint."""
DEFAULT_HTTP_PORT: Final = 5780


def as_array(x: npt.ArrayLike, what: str, kind: str = "an array of numbers") -> npt.NDArray[Any]:
    """Convert anything that numpy reads to an array, except ragged lists; a tensor gives its values."""
    if getattr(x, "requires_grad", False):
        x = x.detach()  # type: ignore[union-attr]
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{what} must be {kind}: {error}") from None


def float32_copy(x: npt.ArrayLike, what: str) -> F32:
    """A contiguous float32 copy of anything numpy reads as booleans, integers or real numbers.

    NaN and infinity pass, because the server decides on them. Finite numbers beyond float32 are refused.
    """
    raw = x if type(x) is np.ndarray else as_array(x, what)
    if raw.dtype == _FLOAT32:
        return raw.copy()
    if raw.dtype.kind not in "fiub":
        raise InvalidInput(f"{what} must be real numbers that convert to float32, not {raw.dtype}")
    with np.errstate(over="ignore"):
        cast = np.array(raw, np.float32, order="C")
    if raw.dtype.kind == "f" and bool(np.any(np.isinf(cast) & np.isfinite(raw))):
        raise InvalidInput(f"{what} holds a finite number too large for float32")
    return cast


def stream_frames(x: npt.ArrayLike, features: int) -> tuple[F32, tuple[int, ...]]:
    """One stream's frame [features] or chunk [T, features] as [T, 1, features], and the shape of the answer."""
    frames = float32_copy(x, "a frame")
    if frames.shape == (features,):
        return frames.reshape(1, 1, features), ()
    if frames.ndim not in (1, 2) or frames.shape[-1] != features or frames.size == 0:
        raise InvalidInput(
            f"a frame must have shape [{features}] and a chunk [T, {features}] with T of at least 1; "
            f"this array has shape {list(frames.shape)}"
        )
    return frames.reshape(-1, 1, features), frames.shape[:-1]


def group_frames(x: npt.ArrayLike, columns: int, features: int) -> tuple[F32, tuple[int, ...]]:
    """A group's frames [N, features] or [T, N, features] as [T, N, features], and the shape of the answer."""
    frames = float32_copy(x, "a group's frames")
    if frames.ndim not in (2, 3) or frames.shape[-2:] != (columns, features) or frames.size == 0:
        raise InvalidInput(
            f"the frames of {columns} streams must have shape [{columns}, {features}] or "
            f"[T, {columns}, {features}] with T of at least 1; this array has shape {list(frames.shape)}"
        )
    return frames.reshape(-1, columns, features), frames.shape[:-1]


def row_indices(rows: npt.ArrayLike, count: int) -> Indices:
    """Check indices of streams in a group of `count`: at least one, distinct, from 0 to `count - 1`."""
    raw = as_array(rows, "rows", "an array of indices")
    if raw.ndim != 1 or raw.size == 0 or raw.dtype.kind not in "iu":
        raise InvalidInput("rows must be a one-dimensional array of at least one integer index")
    wrong = raw[(raw < 0) | (raw >= count)]
    if wrong.size:
        raise InvalidInput(f"rows must be indices from 0 to {count - 1}, and {wrong[0]} is not")
    indices = raw.astype(np.int64)
    mark = np.zeros(count, np.bool_)
    mark[indices] = True
    if int(np.count_nonzero(mark)) != len(indices):
        raise InvalidInput("rows names a stream twice; a stream may stand only once in one step")
    return indices


def counts(x: npt.ArrayLike, count: int, what: str) -> U64:
    """Expand one number from 0 to 2^64 - 1, or one for each of `count` streams, to uint64 [count]."""
    kind = f"one integer of at least 0, or {count} of them"
    numbers = as_array(x, what, kind)
    if numbers.dtype.kind not in "iu" or numbers.shape not in ((), (count,)) or int(numbers.min()) < 0:
        raise InvalidInput(f"{what} must be {kind}")
    return np.broadcast_to(numbers.astype(np.uint64), (count,))


def check_settings(client: str, model: str, timeout_s: float, reconnect_s: float) -> None:
    """Check a client's name and model, which may be empty, and its times.

    Raises:
        InvalidInput: with the accepted values.
    """
    if client and not name_is_good(client):
        raise InvalidInput(f"a client's name must be at most {MAX_NAME_BYTES} bytes of printable UTF-8")
    if len(model) > MAX_MODEL_NAME_LENGTH or not model.isprintable():
        raise InvalidInput(f"a model's name has at most {MAX_MODEL_NAME_LENGTH} printable characters")
    if not timeout_s > 0:
        raise InvalidInput("timeout_s must be more than 0 seconds")
    if not reconnect_s >= 0:
        raise InvalidInput("reconnect_s must be 0 seconds or more")


def check_time(timeout_s: float | None) -> None:
    """Check the longest time of one call, in seconds; None for any time."""
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidInput("timeout_s must be more than 0 seconds, or None for any time")


def good_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of one or more distinct streams."""
    if isinstance(names, str):
        raise InvalidInput("a group's names must be a sequence of strings, not one string")
    names = tuple(names)
    if not names:
        raise InvalidInput("there must be at least one name")
    for at, name in enumerate(names, 1):
        if not isinstance(name, str) or not name_is_good(name):
            which = f" (name {at} of {len(names)})" if len(names) > 1 else ""
            raise InvalidInput(why_no_name(name, which))
    if len(set(names)) != len(names):
        places: dict[str, int] = {}
        twice, first, second = next(
            (name, places[name], at) for at, name in enumerate(names, 1) if places.setdefault(name, at) != at
        )
        raise InvalidInput(
            f"two streams of a group may not have the same name: {_shown(twice)} is there twice, "
            f"names {first} and {second} of {len(names)}"
        )
    return names


def why_no_name(name: object, which: str = "") -> str:
    """A sentence about an invalid name; `which` tells where it was found."""
    return (
        f"{_shown(name)}{which} is not a valid stream name: {_why_bad(name)}; "
        f"a name is a string of 1 to {MAX_NAME_BYTES} bytes of printable UTF-8"
    )


def _why_bad(name: object) -> str:
    if not isinstance(name, str):
        return f"it is of type {type(name).__name__}"
    if not name:
        return "it is empty"
    if unprintable := next((each for each in name if not each.isprintable()), None):
        return f"it holds {unprintable!a}"
    return f"it has {len(name.encode())} bytes"


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def checked_endpoint(endpoint: str) -> str:
    """Return a valid endpoint, `tcp://HOST:PORT` or `ipc://PATH`.

    Raises:
        InvalidInput: with the expected form.
    """
    if isinstance(endpoint, str):
        match = _TCP.fullmatch(endpoint)
        if match is not None and match["port"] != "*" and 1 <= int(match["port"]) <= 65_535:
            return endpoint
        if match is not None:
            raise InvalidInput(
                f"{endpoint!r} is not an endpoint: write the port that the server has, 1 to 65535; a server with "
                "port 0 logs the port that it took"
            )
        if re.fullmatch(r"ipc://\S.*", endpoint):
            return endpoint
        if (http := _HTTP.fullmatch(endpoint)) is not None:
            raise InvalidInput(
                f"{endpoint!r} is an endpoint of HTTP, for browsers and metrics: write that of ZeroMQ, "
                f"tcp://{http['host']}:{DEFAULT_PORT} unless the server has another port"
            )
        address = endpoint.partition("://")[2] or endpoint
        if _ADDRESS.fullmatch(address) and not endpoint.startswith("tcp://"):
            raise InvalidInput(f"{endpoint!r} is not an endpoint: write tcp://{address}")
    raise InvalidInput(f"{endpoint!r} is not an endpoint: write {EXAMPLES}")
