"""The description of a step: frames, the leaves of the state, the normal form, and the graph that it was made from."""
# ruff: noqa: D102 - see `Description`

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from instep.models.base import LEARNED, Leaf, PlainFields, Shape, StateSpec, learned_shapes, state_in_words
from instep.models.errors import ModelError
from instep.models.module.graph import Graph, Size
from instep.models.portable.form import Form, form_of_values
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec
from instep_tools.words import counted


def _parsed(value: object) -> Form:
    if isinstance(value, Form):
        return value
    try:
        return form_of_values(value, "it")
    except ModelError as error:
        raise PydanticCustomError("form", "{why}", {"why": str(error)}) from None


AnyForm = Annotated[Form, PlainValidator(_parsed), PlainSerializer(lambda form: json.loads(form.to_json()))]


class StateLeaf(PlainFields):
    """One leaf of the state: [rows, *shape] in the graph."""

    name: str
    shape: tuple[Size, ...]
    dtype: Literal["float32", "float64", "int64", "bool"] = "float32"
    initial: float | Literal["learned"] = 0.0
    """The value of every element before a stream's first frame; the weights file holds an array that is learned."""

    @property
    def of_row(self) -> Leaf:
        """The leaf of a stream's state."""
        return Leaf(self.name, self.shape, DTYPES[self.dtype], None if self.initial == "learned" else self.initial)


class GraphStep(PlainFields):
    """A step in torch's operators."""

    features: Annotated[int, Field(ge=1, strict=True)]
    leaves: tuple[StateLeaf, ...] = Field(alias="state")
    graph: Graph

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [leaf.name for leaf in self.leaves]
        if set(names) != set(self.graph.new_state):
            raise PydanticCustomError(
                "leaves",
                "the state has the leaves {names}, and the graph gives {given}; make the folder again",
                {"names": ", ".join(names), "given": ", ".join(self.graph.new_state) or "none"},
            )
        return self


class ModuleDescription(PlainFields):
    """A step `y, new_state = step(x, state)` over frames x [rows, features]."""

    kind: Literal["module"] = "module"
    features: Annotated[int, Field(ge=1, strict=True)]
    leaves: tuple[StateLeaf, ...] = Field(alias="state")
    form: AnyForm
    """For one row; its inputs are the frame and the leaves in order."""
    graph: Graph | None = None
    """In torch's operators, for any number of rows; None for a step that comes from elsewhere."""

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
        if [(each.dtype, each.size) for each in inputs] != wanted or not self.form.outputs:
            raise PydanticCustomError("form", "the normal form takes other frames or leaves; make the folder again")
        if self.graph_step is not None and self.graph_step.graph.outputs != self.outputs:
            raise PydanticCustomError("form", "the graph and the normal form differ; make the folder again")
        return self

    @cached_property
    def graph_step(self) -> GraphStep | None:
        """The step in torch's operators, where it came from there."""
        if self.graph is None:
            return None
        return GraphStep(features=self.features, state=self.leaves, graph=self.graph)

    @property
    def outputs(self) -> int:
        return self.form.outputs[0].elements

    @property
    def state(self) -> StateSpec:
        return StateSpec(tuple(leaf.of_row for leaf in self.leaves))

    def _of_step(self) -> dict[str, tuple[Shape, str]]:
        """The tensors of the graph, and of those that only the form has their elements, with dtypes."""
        graph = self.graph.tensors if self.graph else ()
        form = {each.tensor: ((each.size,), each.dtype) for each in self.form.buffers if each.tensor}
        return {each.name: (each.shape, each.dtype) for each in graph} | {
            name: each for name, each in form.items() if name not in {tensor.name for tensor in graph}
        }

    def tensor_shapes(self) -> dict[str, Shape]:
        """Parameters, buffers and constants, in the graph's order, and what learned leaves begin with."""
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
