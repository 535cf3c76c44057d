"""An archive of `torch.export.save` (`.pt2`) as plain data: its graph and its tensors.

It is a zip file. `models/model.json` holds the graph; `data/weights/` and `data/constants/` hold the bytes of tensors,
each with a file that says which bytes are which tensor. `zipfile` and `json` read these, and everything in them may
come from a stranger. `data/sample_inputs/model.pt`, a pickle, is never opened.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import torch
from pydantic import (
    AfterValidator,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    Json,
    JsonValue,
    ValidationError,
)

from instep.models.errors import ModelError
from instep.models.folder import MAX_GRAPH_BYTES
from instep.models.module.graph import MAX_JSON_BYTES, MAX_NODES
from instep.models.registry import sentences

SCHEMA: Final = 8
"""The major version of the graph's form, as in `torch._export.serde.schema`."""
AGAIN: Final = "save the step again with torch.export.save"
DTYPES: Final[dict[int, torch.dtype]] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
"""By their numbers in the schema."""
STRIDED: Final = 7
"""The number of the layout that dense tensors have."""
_FOLDERS: Final = {"weights": "data/weights/", "constants": "data/constants/"}
_MAX_MEMBERS: Final = 20_000
_DIRECTORY_ENTRY: Final = b"PK\x01\x02"
_ERRORS: Final = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)
"""What zipfile raises, depending on what is damaged."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name has characters that cannot be printed")
    return text


Name: TypeAlias = Annotated[str, Field(max_length=400), AfterValidator(_printable)]
Argument: TypeAlias = dict[str, JsonValue]
"""One key, which says what the value is: `{"as_int": 3}`."""


def _at(*path: str | int) -> Any:
    return Field(validation_alias=AliasPath("graph_module", *path))


def _extent(value: Any) -> Any:
    return value.get("as_int", None if "as_expr" in value else value) if isinstance(value, dict) else value


Extent: TypeAlias = Annotated[Annotated[int, Field(ge=0, lt=2**40)] | None, BeforeValidator(_extent)]
"""A size, stride or offset; None if it is symbolic."""


def _bounded(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_NODES:  # `max_length` looks only once all are validated
        raise ValueError(f"at most {MAX_NODES:,} keys are read")
    return value


_Item = TypeVar("_Item")
_List: TypeAlias = Annotated[list[_Item], FailFast(), Field(max_length=MAX_NODES)]
"""One error is enough: there could be millions, at a kilobyte each."""
_Named: TypeAlias = Annotated[dict[Name, _Item], BeforeValidator(_bounded)]


class _Fields(BaseModel):
    """Those keys of the schema that are used here, by its names."""

    model_config = ConfigDict(frozen=True, strict=True)


class TensorMeta(_Fields):
    """A tensor without its values; sizes and strides count elements."""

    dtype: int
    sizes: Annotated[list[Extent], Field(max_length=16)]
    strides: Annotated[list[Extent], Field(max_length=16)]
    storage_offset: Extent
    layout: int


class NamedArgument(_Fields):
    """An argument of a call, by its name in the operator's schema."""

    name: Name
    arg: Argument


class SerializedCall(_Fields):
    """One call of an operator."""

    target: Name
    inputs: _List[NamedArgument]
    outputs: _List[Argument]
    stack_trace: str = Field("", validation_alias=AliasPath("metadata", "stack_trace"))
    """It tells the line of the user's code."""


class Tree(_Fields):
    """How a value is made of tensors: one of them where the type is None."""

    type: Name | None
    context: Json[Any] | None
    """Of a dict: its keys."""
    children_spec: _List[Tree]

    def leaves(self) -> int:
        """How many tensors there are."""
        return 1 if self.type is None else sum(child.leaves() for child in self.children_spec)

    def build(self, values: Iterator[Any]) -> Any:
        """Build it of the next values.

        Raises:
            ModelError: when it is made of anything but tuples, lists and dicts.
        """
        if self.type is None:
            return next(values)
        children = [child.build(values) for child in self.children_spec]
        if self.type in ("builtins.tuple", "builtins.list"):
            return tuple(children) if self.type == "builtins.tuple" else children
        if self.type in ("builtins.dict", "collections.OrderedDict") and isinstance(self.context, list):
            return dict(zip(map(str, self.context), children, strict=False))
        raise ModelError(f"the step takes or returns a {self.type}; use tensors in tuples, lists and dicts")


Trees: TypeAlias = Json[tuple[Literal[1], Tree]]
"""A text that holds a version and a tree."""


class SerializedProgram(_Fields):
    """An exported program."""

    nodes: _List[SerializedCall] = _at("graph", "nodes")
    outputs: _List[Argument] = _at("graph", "outputs")
    tensor_values: _Named[TensorMeta] = _at("graph", "tensor_values")
    input_specs: _List[_Named[_Named[JsonValue]]] = _at("signature", "input_specs")
    """The role of each input of the graph, which is its one key: `{"parameter": {...}}`."""
    output_specs: _List[_Named[_Named[JsonValue]]] = _at("signature", "output_specs")
    in_spec: Trees = _at("module_call_graph", 0, "signature", "in_spec")
    """How args and kwargs are made of inputs."""
    out_spec: Trees = _at("module_call_graph", 0, "signature", "out_spec")


class _Version(_Fields):
    major: int = Field(validation_alias=AliasPath("schema_version", "major"))


class _Payload(_Fields):
    path_name: Name
    use_pickle: bool
    tensor_meta: TensorMeta | None
    """None of an object of Python."""


class _Payloads(_Fields):
    config: _Named[_Payload]


_Form = TypeVar("_Form", bound=_Fields)


@dataclass(frozen=True, slots=True)
class ExportArchive:
    """What an archive holds; parameters, buffers and constants by their names."""

    program: SerializedProgram
    tensors: dict[str, torch.Tensor]


def read_archive(content: bytes) -> ExportArchive:
    """Read an archive; nothing in it is executed.

    Raises:
        ModelError: it is not an archive as torch writes it, or keeps tensors in a form that can run code.
    """
    members = _Members(content)
    _refuse_pickles([each for each in members.names if _is_pickle(each)])
    programs = [each for each in members.names if each.startswith("models/") and each.endswith(".json")]
    if len(programs) != 1:
        compiled = any(each.startswith("data/aotinductor/") for each in members.names)
        held = "compiled code" if compiled else f"{len(programs) or 'no'} programs of torch.export"
        raise ModelError(f"the archive holds {held}; save one step alone, with torch.export.save")
    version = members.parsed(programs[0], _Version).major
    if version != SCHEMA:
        raise ModelError(
            f"the archive has version {version} of torch.export's schema, and version {SCHEMA} can be read: export the "
            f"step again, with a torch such as {torch.__version__}"
        )
    name = programs[0].removeprefix("models/").removesuffix(".json")
    payloads = [
        (tensor, folder + payload.path_name, payload)
        for kind, folder in _FOLDERS.items()
        for tensor, payload in members.parsed(f"{folder}{name}_{kind}_config.json", _Payloads).config.items()
    ]
    _refuse_pickles([f"{tensor} ({path})" for tensor, path, payload in payloads if payload.use_pickle])
    program = members.parsed(programs[0], SerializedProgram)
    contents = {path: bytearray(members.read(path)) for path in {path for _, path, _ in payloads}}
    tensors, total = {}, 0
    for tensor, path, payload in payloads:
        try:
            tensors[tensor] = _tensor(payload.tensor_meta, contents[path])
        except ValueError as error:
            raise ModelError(f"{tensor} in {path} {error}") from None
        total += tensors[tensor].nbytes
        if total > MAX_GRAPH_BYTES:
            raise ModelError(f"the tensors have more than {MAX_GRAPH_BYTES:,} bytes, and cannot be served")
    return ExportArchive(program, tensors)


class _Members:
    """The members of a zip file, by their names without the folder that holds them all.

    Raises:
        ModelError: when it is not an archive as torch writes it.
    """

    def __init__(self, content: bytes) -> None:
        try:
            if content.count(_DIRECTORY_ENTRY) > _MAX_MEMBERS:
                raise zipfile.BadZipFile("it has too many members")
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except _ERRORS as error:
            raise ModelError(f"it is not an archive of torch.export.save ({error!s:.80}); {AGAIN}") from None
        infos = self._zip.infolist()
        root = infos[0].filename.partition("/")[0] + "/" if infos and "/" in infos[0].filename else ""
        self._infos = {info.filename.removeprefix(root): info for info in infos}
        self.names: Final = list(self._infos)
        for is_wrong, words in (
            (len(self._infos) != len(infos), "two members of one name"),
            (any(info.compress_type or info.flag_bits & 1 for info in infos), "compressed or encrypted members"),
            (sum(info.file_size for info in infos) > len(content), "members that overlap"),
        ):
            if is_wrong:
                raise ModelError(f"the archive has {words}, which torch.export.save does not write; {AGAIN}")
        if "byteorder" in self._infos and self.read("byteorder") != sys.byteorder.encode():
            raise ModelError(f"the archive comes from a machine of the other byte order; {AGAIN} on one like this")

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        try:
            return self._zip.read(self._infos[name])
        except KeyError:
            raise ModelError(f"the archive has no {name}; {AGAIN}") from None
        except _ERRORS as error:
            raise ModelError(f"the archive is damaged ({error!s:.80}); {AGAIN}") from None

    def parsed(self, name: str, form: type[_Form]) -> _Form:
        """A member of JSON."""
        content = self.read(name)
        if len(content) > MAX_JSON_BYTES:
            raise ModelError(f"{name} has {len(content):,} bytes, and at most {MAX_JSON_BYTES:,} are read")
        try:
            return form.model_validate(json.loads(content))
        except ValidationError as error:
            raise ModelError(f"{name} is not in torch's form ({sentences(error)}); {AGAIN}") from None
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{name} is not JSON ({error!s:.80}); {AGAIN}") from None


def _is_pickle(member: str) -> bool:
    """Whether older versions of torch keep tensors there; sample inputs are not needed."""
    return member.endswith(".pt") and member.startswith((*_FOLDERS.values(), "serialized_"))


def _refuse_pickles(held: Sequence[str]) -> None:
    if held:
        shown = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise ModelError(
            f"the archive keeps {shown} as a pickle, and reading one runs code that the file may hold: export a step "
            f"of plain tensors with a torch such as {torch.__version__}, or hand over the module itself with "
            "instep.models.export_step"
        )


def _tensor(meta: TensorMeta | None, content: bytearray) -> torch.Tensor:
    """A contiguous copy of a tensor within the bytes of a member.

    Raises:
        ValueError: when it is not dense, or leaves them.
    """
    dtype = DTYPES.get(meta.dtype) if meta else None
    if meta is None or dtype is None or meta.layout != STRIDED:
        raise ValueError("is not a dense tensor of a plain dtype; give the step float32 tensors")
    sizes: Any = meta.sizes
    strides: Any = meta.strides
    offset: Any = meta.storage_offset
    if (
        None in (*sizes, *strides, offset)
        or len(sizes) != len(strides)
        or (0 in sizes and math.prod(size or 1 for size in sizes) > MAX_GRAPH_BYTES)  # more than torch can multiply
    ):
        raise ValueError(f"has sizes or strides that no tensor has; {AGAIN}")
    count = math.prod(sizes)
    end = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if count else 0
    if max(end, count) * dtype.itemsize > len(content):  # a tensor that was expanded has more elements than bytes
        raise ValueError(
            f"asks for more than the {len(content):,} bytes of that member; {AGAIN}, and expanded tensors after "
            ".contiguous()"
        )
    if not count:
        return torch.empty(sizes, dtype=dtype)
    is_bool = dtype == torch.bool  # a byte besides 0 and 1 is no bool, and operators may misbehave on it
    values = torch.frombuffer(content, dtype=torch.uint8 if is_bool else dtype, count=end)
    tensor = values.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)
    return tensor != 0 if is_bool else tensor
