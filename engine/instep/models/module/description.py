"""The description of a step: frames, the leaves of the state, the normal form, and the graph that it was made from.

The graph, in the file `graph.json`, holds the tensors that the step computes with, one call of a torch operator after
another, and which values are the outputs and the new state. An argument of a call is a JSON value, or one of these
objects:

* `{"x": true}`, the frames; `{"state": NAME}`, a leaf of the state; `{"rows": true}`, how many rows the batch has;
* `{"tensor": NAME}`, a tensor of the weights file; `{"node": NAME}`, what an earlier call returned;
* `{"float": "inf"}`, for numbers that JSON lacks; `{"dtype": "float32"}`; `{"memory_format": "contiguous_format"}`;
  `{"device": true}`, wherever the model is served.

Nothing in it is code: `program` turns it into calls of operators that `operators` allows, and refuses the rest.
"""
# ruff: noqa: D102 - see `Description`

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import Field, JsonValue, PlainSerializer, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from instep.models.base import LEARNED, Leaf, PlainFields, Shape, StateSpec, learned_shapes, state_in_words
from instep.models.errors import ModelError
from instep.models.portable.form import Form, form_of_values
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec
from instep_tools.words import counted

Size: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
TensorType: TypeAlias = Literal["float32", "float64", "int64", "int32", "bool"]
MAX_NODES: Final = 20_000
MAX_JSON_BYTES: Final = 2**23
"""The size limit of a graph's JSON. A call takes 100 to 250 bytes, and checking takes up to 50 times the file's size.
"""


def _parsed(value: object) -> Form:
    if isinstance(value, Form):
        return value
    try:
        return form_of_values(value, "it")
    except ModelError as error:
        raise PydanticCustomError("form", "{why}", {"why": str(error)}) from None


AnyForm = Annotated[Form, PlainValidator(_parsed), PlainSerializer(lambda form: json.loads(form.to_json()))]


class StateLeaf(PlainFields):
    """One leaf of the state, [rows, *shape] in the graph."""

    name: str
    shape: tuple[Size, ...]
    dtype: Literal["float32", "float64", "int64", "bool"] = "float32"
    initial: float | Literal["learned"] = 0.0
    """The value of every element before a stream's first frame, unless the weights file has a learned array."""

    @property
    def of_row(self) -> Leaf:
        """The same leaf without the axis of rows."""
        return Leaf(self.name, self.shape, DTYPES[self.dtype], None if self.initial == "learned" else self.initial)


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

    tensors: tuple[GraphTensor, ...]
    nodes: Annotated[tuple[OperatorCall, ...], Field(max_length=MAX_NODES)]
    y: JsonValue
    """The outputs, [rows, outputs]."""
    new_state: dict[str, JsonValue]
    """Values by leaf, [rows, *shape]."""


class ModuleDescription(PlainFields):
    """A step `y, new_state = step(x, state)` over frames x [rows, features]."""

    kind: Literal["module"] = "module"
    features: Annotated[int, Field(ge=1, strict=True)]
    leaves: tuple[StateLeaf, ...] = Field(alias="state")
    form: AnyForm
    """The normal form of one row, whose inputs are the frame and the leaves in order."""
    graph: Graph | None = None
    """The step in torch's operators, for any number of rows; None if it was not made from torch."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            state = self.state
        except InvalidStateSpec as error:
            raise PydanticCustomError("state", "{why}", {"why": str(error)}) from None
        if taken := learned_shapes(state).keys() & self._of_step().keys():
            raise PydanticCustomError(
                "learned", "the step has a tensor {name}; call it otherwise, and export again", {"name": min(taken)}
            )
        inputs = [self.form.buffers[index] for index in self.form.inputs if 0 <= index < len(self.form.buffers)]
        wanted = [("float32", self.features), *((leaf.dtype.name, leaf.elements) for leaf in state.leaves)]
        names = [leaf.name for leaf in self.leaves]
        new_state = self.graph.new_state if self.graph else dict.fromkeys(names)
        takes_others = [(each.dtype, each.size) for each in inputs] != wanted or not self.form.outputs
        if takes_others or new_state.keys() != set(names):
            raise PydanticCustomError(
                "form", "the normal form or the graph takes other frames or leaves; make the folder again"
            )
        for name in names:  # a recording's header has sorted them
            new_state[name] = new_state.pop(name)
        return self

    @property
    def outputs(self) -> int:
        return self.form.outputs[0].elements

    @property
    def state(self) -> StateSpec:
        return StateSpec(tuple(leaf.of_row for leaf in self.leaves))

    def _of_step(self) -> dict[str, tuple[Shape, str]]:
        """The shape and dtype of each tensor. A tensor that only the form has is flat."""
        graph = self.graph.tensors if self.graph else ()
        form = {each.tensor: ((each.size,), each.dtype) for each in self.form.buffers if each.tensor}
        return {each.name: (each.shape, each.dtype) for each in graph} | {
            name: each for name, each in form.items() if name not in {tensor.name for tensor in graph}
        }

    def tensor_shapes(self) -> dict[str, Shape]:
        """Parameters, buffers and constants in the graph's order, then the arrays of learned initial states."""
        return {name: shape for name, (shape, _) in self._of_step().items()} | learned_shapes(self.state)

    def tensor_dtype(self, tensor: str) -> str:
        dtypes: dict[str, str] = {name: dtype for name, (_, dtype) in self._of_step().items()}
        return (dtypes | {LEARNED + leaf.name: leaf.dtype for leaf in self.leaves})[tensor]

    def in_words(self) -> str:
        """`40 features → step of 12 operators, state h [128] → 10 outputs`."""
        state = state_in_words(self.state)
        operators = counted(len(self.form.nodes), "operator")
        return f"{self.features} features → step of {operators}, {state} → {counted(self.outputs, 'output')}"

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        return {
            "kind": self.kind,
            **self.model_dump(mode="json", by_alias=True, exclude_defaults=not defaults),
        }


def graph_text(graph: Any) -> str:
    """A graph's plain values as JSON, one tensor or call per line."""
    parts = []
    for key, value in graph.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(each, allow_nan=False) for each in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def parsed_graph(content: bytes, file: str) -> Any:
    """The values of a graph file, unchecked.

    Raises:
        ModelError: when it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); make the folder again") from None
