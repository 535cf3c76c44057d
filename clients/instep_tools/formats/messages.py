"""Messages of MCAP channels as numbers: JSON, protobuf, and ROS 2 messages in CDR, by the schemas in the file."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

Decoder: TypeAlias = Callable[[bytes], Any]
"""A message as dicts, lists and numbers; what holds no numbers may be left out. Raises ValueError or LookupError."""

_NOT_DATA: Final = frozenset(
    {
        "builtin_interfaces/Time",
        "builtin_interfaces/Duration",
        "std_msgs/MultiArrayLayout",
        "google.protobuf.Timestamp",
        "google.protobuf.Duration",
    }
)
"""Types whose numbers say something about the data, and are not the data."""


def decoder(schema: Any, encoding: str) -> Decoder | None:
    """A decoder of a channel's messages, or None where there is none for them.

    The schema is as the mcap library gives it; None where the channel has none.
    """
    match encoding, getattr(schema, "encoding", ""):
        case "json", _:
            return json.loads
        case "protobuf", "protobuf":
            return _protobuf(schema)
        case "cdr", "ros2msg":
            return _Ros2(schema.name, schema.data.decode()).decode
    return None


def flatten(value: Any) -> tuple[list[str], list[float]]:
    """All numbers of a decoded message in order, with their names: `angular_velocity.x`, `data[2]`.

    Text and booleans are left out.
    """
    names: list[str] = []
    numbers: list[float] = []
    _flatten(value, "", names, numbers)
    return names, numbers


def _flatten(value: Any, name: str, names: list[str], numbers: list[float]) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(part, f"{name}.{key}" if name else str(key), names, numbers)
    elif isinstance(value, list | np.ndarray):
        for at, part in enumerate(value):
            _flatten(part, f"{name}[{at}]", names, numbers)
    elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
        names.append(name or "value")
        numbers.append(float(value))


def _protobuf(schema: Any) -> Decoder:
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(schema.data).file:
        pool.Add(file)
    message_class: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName(schema.name))

    def decode(data: bytes) -> Any:
        message = message_class()
        try:
            message.ParseFromString(data)
        except Exception as error:  # its DecodeError has no base of its own in some versions
            raise ValueError(str(error)) from None
        return _protobuf_value(message)

    return decode


def _protobuf_value(message: Any) -> dict[str, Any] | None:
    """The fields of a message that hold numbers, or messages that do."""
    if message.DESCRIPTOR.full_name in _NOT_DATA:
        return None
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            if hasattr(value, "DESCRIPTOR"):
                values[field.name] = _protobuf_value(value)
            elif not hasattr(value, "items"):  # a map has no order
                values[field.name] = [_protobuf_value(part) for part in value]
        elif field.cpp_type not in (field.CPPTYPE_STRING, field.CPPTYPE_BOOL, field.CPPTYPE_ENUM):
            values[field.name] = value if isinstance(value, int | float) else list(value)
    return values


_NUMBERS: Final = ("float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_PRIMITIVES: Final = {
    **{name: np.dtype(name) for name in _NUMBERS},
    "byte": np.dtype("uint8"),
    "char": np.dtype("uint8"),
    "bool": np.dtype("bool"),
}
_BUILT_IN: Final = {
    "builtin_interfaces/Time": "int32 sec\nuint32 nanosec",
    "builtin_interfaces/Duration": "int32 sec\nuint32 nanosec",
    "std_msgs/Header": "builtin_interfaces/Time stamp\nstring frame_id",
}
_FIELD: Final = re.compile(r"([\w/]+)(<=\d+)?(\[(<=)?(\d*)\])?\s+(\w+)\b(?!\s*=)")
_ENCAPSULATION: Final[dict[int, Literal["<", ">"]]] = {0: ">", 1: "<"}


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    type: str
    count: int | None
    """Of a fixed array; 0 for a sequence of any length; None for a single value."""


class _Ros2:
    """A ROS 2 message type and those it is made of, as the text of their definitions."""

    def __init__(self, name: str, text: str) -> None:
        self._name = _short(name)
        self._types: dict[str, list[_Field]] = {}
        texts = dict(_BUILT_IN)
        first, *others = re.split(r"^=+\n", text, flags=re.M)
        for other in others:
            head, _, body = other.partition("\n")
            texts[_short(head.removeprefix("MSG:").strip())] = body
        texts[self._name] = first
        for of, body in texts.items():
            self._types[of] = list(self._fields(of, body, texts))

    def decode(self, data: bytes) -> Any:
        """A message in the encapsulation of CDR."""
        if len(data) < 4 or data[0] != 0 or data[1] not in _ENCAPSULATION:
            raise ValueError(f"it is not plain CDR (its first bytes are {data[:4].hex()})")
        return self._message(self._name, _Cdr(data[4:], _ENCAPSULATION[data[1]]))

    @staticmethod
    def _fields(of: str, text: str, texts: Mapping[str, str]) -> Any:
        for line in text.splitlines():
            found = _FIELD.match(line.partition("#")[0].strip())
            if not found:
                continue
            kind, _, is_array, bounded, count, name = found.groups()
            kind = _short(kind)
            if kind not in _PRIMITIVES and kind not in ("string", "wstring") and kind not in texts:
                here = f"{of.partition('/')[0]}/{kind}"
                kind = "std_msgs/Header" if kind == "Header" and here not in texts else here
            yield _Field(name, kind, (0 if bounded else int(count or 0)) if is_array else None)

    def _message(self, of: str, cdr: _Cdr) -> Any:
        if of not in self._types:
            raise ValueError(f"the file does not define {of}")
        values = {field.name: self._value(field, cdr) for field in self._types[of]}
        if not values:
            cdr.skip(1)  # an empty structure has one byte
        return None if of in _NOT_DATA else values

    def _value(self, field: _Field, cdr: _Cdr) -> Any:
        count = 1 if field.count is None else field.count or cdr.count()
        if field.type in _PRIMITIVES:
            found = cdr.numbers(_PRIMITIVES[field.type], count)
            return None if found.dtype == np.bool_ else found[0] if field.count is None else found
        if field.type == "string":
            for _ in range(count):
                cdr.skip(cdr.count())
            return None
        if field.type == "wstring":
            raise ValueError("it holds a wstring, which cannot be read here")
        parts = [self._message(field.type, cdr) for _ in range(count)]
        return parts[0] if field.count is None else parts


class _Cdr:
    """Common Data Representation: values at multiples of their size, counted from behind the encapsulation."""

    def __init__(self, data: bytes, order: Literal["<", ">"]) -> None:
        self._data = data
        self._order = order
        self._at = 0

    def numbers(self, kind: np.dtype[Any], count: int) -> Any:
        """`count` numbers of a kind."""
        dtype = kind.newbyteorder(self._order)
        if count:
            self._at += -self._at % dtype.itemsize
        start = self._at
        self.skip(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start) if count else np.empty(0, dtype)

    def count(self) -> int:
        """The length that stands before a sequence or a text."""
        self._at += -self._at % 4
        start = self._at
        self.skip(4)
        return int(struct.unpack_from(f"{self._order}I", self._data, start)[0])

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        self._at += size
        if self._at > len(self._data):
            raise ValueError("it ends too early")


def _short(name: str) -> str:
    """`std_msgs/msg/Header` is `std_msgs/Header`."""
    return name.replace("/msg/", "/")
