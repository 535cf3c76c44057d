"""The description of a step module: frames, the leaves of the state, and the graph."""
# ruff: noqa: D102 - see `Description`

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from instep.models.base import LEARNED, Leaf, PlainFields, Shape, StateSpec, learned_shapes, state_in_words
from instep.models.module.graph import Graph, Size
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec
from instep_tools.words import counted


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


class ModuleDescription(PlainFields):
    """A step `y, new_state = step(x, state)` over frames x [rows, features]."""

    kind: Literal["module"] = "module"
    features: Annotated[int, Field(ge=1, strict=True)]
    leaves: tuple[StateLeaf, ...] = Field(alias="state")
    graph: Graph

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            names = [leaf.name for leaf in self.state.leaves]
        except InvalidStateSpec as error:
            raise PydanticCustomError("state", "{why}", {"why": str(error)}) from None
        if taken := learned_shapes(self.state).keys() & {tensor.name for tensor in self.graph.tensors}:
            raise PydanticCustomError(
                "learned", "the step has a tensor {name}; call it otherwise, and export again", {"name": min(taken)}
            )
        if set(names) != set(self.graph.new_state):
            raise PydanticCustomError(
                "leaves",
                "the state has the leaves {names}, and the graph gives {given}; make the folder again",
                {"names": ", ".join(names), "given": ", ".join(self.graph.new_state) or "none"},
            )
        return self

    @property
    def outputs(self) -> int:
        return self.graph.outputs

    @property
    def state(self) -> StateSpec:
        return StateSpec(tuple(leaf.of_row for leaf in self.leaves))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Parameters, buffers and constants, in the graph's order, and what learned leaves begin with."""
        return {tensor.name: tensor.shape for tensor in self.graph.tensors} | learned_shapes(self.state)

    def tensor_dtype(self, tensor: str) -> str:
        dtypes: dict[str, str] = {each.name: each.dtype for each in self.graph.tensors}
        return (dtypes | {LEARNED + leaf.name: leaf.dtype for leaf in self.leaves})[tensor]

    def in_words(self) -> str:
        """`40 features → step of 12 operators, state h [128] → 10 outputs`."""
        state = state_in_words(self.state)
        operators = counted(len(self.graph.nodes), "operator")
        return f"{self.features} features → step of {operators}, {state} → {counted(self.outputs, 'output')}"

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        return {
            "kind": self.kind,
            **self.model_dump(mode="json", by_alias=True, exclude_defaults=not defaults),
        }
