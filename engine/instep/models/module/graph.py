"""The graph of a step as plain data: the file `graph.json`.

It holds the tensors that the step computes with, one call of a torch operator after another, and which values are the
outputs and the new state. An argument of a call is a JSON value, or one of these objects:

* `{"x": true}`, the frames; `{"state": NAME}`, a leaf of the state; `{"rows": true}`, how many rows the batch has;
* `{"tensor": NAME}`, a tensor of the weights file; `{"node": NAME}`, what an earlier call returned;
* `{"float": "inf"}`, for numbers that JSON lacks; `{"dtype": "float32"}`; `{"memory_format": "contiguous_format"}`;
  `{"device": true}`, wherever the model is served.

Nothing in it is code: `program` turns it into calls of operators that `operators` allows, and refuses the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, JsonValue

from instep.models.base import PlainFields
from instep.models.errors import ModelError

Size: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
TensorType: TypeAlias = Literal["float32", "float64", "int64", "int32", "bool"]
MAX_NODES: Final = 20_000
MAX_JSON_BYTES: Final = 2**23
"""Of a graph as JSON, in which a call takes 100 to 250 bytes; checking it takes up to 50 times as much memory."""


class GraphTensor(PlainFields):
    """A parameter, buffer or constant: `name` is its name in the weights file."""

    name: str = Field(min_length=1, max_length=400)
    shape: tuple[Size, ...]
    dtype: TensorType = "float32"


class OperatorCall(PlainFields):
    """One call: `op` is `aten.linear.default`, an integer operation such as `int.mul`, or `getitem`."""

    name: str = Field(min_length=1, max_length=400)
    op: str = Field(max_length=200)
    args: tuple[JsonValue, ...]
    kwargs: dict[str, JsonValue] = Field({})


class Graph(PlainFields):
    """The whole step, in the order in which it runs."""

    outputs: Annotated[int, Field(ge=1, strict=True)]
    """Values per frame that the step answers."""
    tensors: tuple[GraphTensor, ...]
    nodes: Annotated[tuple[OperatorCall, ...], Field(max_length=MAX_NODES)]
    y: JsonValue
    """The outputs, [rows, outputs]."""
    new_state: dict[str, JsonValue]
    """By leaf, [rows, *shape]."""


def references(value: Any, kind: str) -> Iterator[str]:
    """The names of nodes, leaves or tensors that an argument, or arguments in lists, refer to."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from references(each, kind)
    elif isinstance(value, dict):
        if isinstance(value.get(kind), str):
            yield value[kind]
        else:
            for each in value.values():
                yield from references(each, kind)


def graph_text(graph: Any) -> str:
    """A graph's plain values as JSON, with one tensor or call in each line."""
    parts = []
    for key, value in graph.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(each, allow_nan=False) for each in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def parsed_graph(content: bytes, file: str) -> Any:
    """The values of a graph file, not checked.

    Raises:
        ModelError: when it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); make the folder again") from None
