"""The description of a step graph in ONNX: which of its inputs and outputs are the frame, the answer and the state."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from instep.models.base import Leaf, PlainFields, Shape, StateSpec
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec

ROWS: Final = "rows"
Extent: TypeAlias = Annotated[int, Field(ge=1, strict=True)] | Literal["rows"]
Extents: TypeAlias = tuple[Extent, ...]
"""The shape of a tensor of the graph; `rows` is the axis that counts the rows of a batch, if the graph has one."""
Dtype: TypeAlias = Literal["float32", "float64", "int64", "bool"]
DTYPE_NAMES: Final[dict[str, Dtype]] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
"""Names of dtypes by onnxruntime's."""
TensorName: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]


class Tensor(NamedTuple):
    """An input or output of the graph."""

    name: str
    shape: Extents
    dtype: Dtype

    def sized(self, rows: int) -> Shape:
        """The shape in a batch of `rows`."""
        return tuple(rows if extent == ROWS else extent for extent in self.shape)


def _with_one_axis_of_rows(shape: Extents) -> Extents:
    if shape.count(ROWS) > 1:
        raise PydanticCustomError("rows", "only one extent may be `rows`, the axis that counts the rows of a batch")
    return shape


Batched: TypeAlias = Annotated[Extents, AfterValidator(_with_one_axis_of_rows)]


def _row_shape(shape: Extents) -> Shape:
    """Without the axis of rows. A graph of one row does not say which that is, so all axes of extent 1 are left out."""
    return tuple(extent for extent in shape if extent != ROWS and (extent != 1 or ROWS in shape))


class Vectors(PlainFields):
    """The frames, or the answers: a vector for each row."""

    tensor: TensorName
    shape: Batched
    dtype: Literal["float32", "float64"] = "float32"
    """In the graph. Frames and outputs are float32 everywhere else."""

    @field_validator("shape")
    @classmethod
    def _rows_come_first(cls, shape: Extents) -> Extents:
        if ROWS in shape and any(extent != 1 for extent in shape[: shape.index(ROWS)]):
            raise PydanticCustomError("rows", "only axes of extent 1 may come before `rows`")
        return shape

    @property
    def size(self) -> int:
        """Values of a row."""
        return math.prod(_row_shape(self.shape))

    @property
    def in_graph(self) -> Tensor:
        """The input or output that they are."""
        return Tensor(self.tensor, self.shape, self.dtype)


class GraphLeaf(PlainFields):
    """A leaf of the state: an input of the graph, and the output that is that input in the next step."""

    name: str
    input: TensorName
    output: TensorName
    shape: Batched
    dtype: Dtype = "float32"

    @property
    def of_row(self) -> Leaf:
        """The leaf of a stream's state."""
        return Leaf(self.name, _row_shape(self.shape), DTYPES[self.dtype])

    @property
    def before(self) -> Tensor:
        """The input."""
        return Tensor(self.input, self.shape, self.dtype)

    @property
    def after(self) -> Tensor:
        """The output."""
        return Tensor(self.output, self.shape, self.dtype)


class Constant(PlainFields):
    """An input that is the same in every step, such as a sampling rate."""

    input: TensorName
    value: int | float
    """Of every element."""
    shape: Extents = ()
    dtype: Dtype = "float32"

    @property
    def in_graph(self) -> Tensor:
        """The input that it is."""
        return Tensor(self.input, self.shape, self.dtype)


class OnnxDescription(PlainFields):
    """Which tensors of a graph are the frame, the answer, the leaves and constants."""

    frame: Vectors
    answer: Vectors
    leaves: tuple[GraphLeaf, ...]
    constants: tuple[Constant, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> OnnxDescription:
        for tensors in (self.graph_inputs, self.graph_outputs):
            name, count = Counter(tensor.name for tensor in tensors).most_common(1)[0]
            if count > 1:
                raise PydanticCustomError("twice", "{name} is mapped twice", {"name": name})
        shapes = [self.answer.shape, *(leaf.shape for leaf in self.leaves)]
        if any((ROWS in shape) != self.is_batched for shape in shapes):
            raise PydanticCustomError(
                "rows", "frame, answer and leaves must all have an axis of `rows`, or none of them"
            )
        try:
            _ = self.state
        except InvalidStateSpec as error:
            raise PydanticCustomError("state", "{reason}", {"reason": str(error)}) from None
        return self

    @property
    def is_batched(self) -> bool:
        """Whether the graph computes any number of rows, not only one."""
        return ROWS in self.frame.shape

    @property
    def features(self) -> int:
        """Values of a frame."""
        return self.frame.size

    @property
    def state(self) -> StateSpec:
        """The leaves, without their axes of rows."""
        return StateSpec(tuple(leaf.of_row for leaf in self.leaves))

    @property
    def graph_inputs(self) -> list[Tensor]:
        """All inputs of the graph: the frame first, then the state."""
        leaves = [leaf.before for leaf in self.leaves]
        return [self.frame.in_graph, *leaves, *(constant.in_graph for constant in self.constants)]

    @property
    def graph_outputs(self) -> list[Tensor]:
        """The outputs of the graph that are used: the answer, then the state."""
        return [self.answer.in_graph, *(leaf.after for leaf in self.leaves)]
