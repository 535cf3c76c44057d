"""A kind of model that puts a stream's last values in front of each frame, for a network of any other kind."""
# ruff: noqa: D102 - see the protocols in `base`

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from instep.core.typing import I64
from instep.models.base import Description, Floats, Leaf, PlainFields, Reference, Shape, StateSpec
from instep.models.errors import ModelError
from instep.models.portable.form import Builder, Form, narrow
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec

if TYPE_CHECKING:
    import torch

    from instep.models.model import Model
    from instep.models.torch_network import Forward, Leaves

CONTEXT: Final = "context"
"""The name of the leaf that stores a stream's last values."""
Size = Annotated[int, Field(ge=1, strict=True)]


class PipelineDescription(PlainFields):
    """The network's frame consists of the stream's last `context` values and the new frame of `features` values.

    This makes overlapping windows: frames of 160 samples with a context of 352 are windows of 512 samples, one every
    160. Before a stream's first frame the context is zeros.
    """

    kind: Literal["pipeline"] = "pipeline"
    features: Size
    context: Size
    network: Any
    """A `Description` of any other kind; `model.yaml` has its keys here."""

    @field_validator("network", mode="before")
    @classmethod
    def _parsed(cls, value: object) -> Description:
        from instep.models.registry import parse_description

        if isinstance(value, Mapping):
            try:
                value = parse_description(value)
            except ModelError as error:
                raise PydanticCustomError("network", "{why}", {"why": str(error)}) from None
        if not hasattr(value, "tensor_shapes") or isinstance(value, PipelineDescription):
            raise PydanticCustomError("network", "it must hold the keys of a network that is not a pipeline")
        return value  # type: ignore[return-value]

    @model_validator(mode="after")
    def _fits(self) -> PipelineDescription:
        if self.features + self.context != self.network.features:
            raise PydanticCustomError(
                "sizes",
                "frames of {features} values with a context of {context} do not make the {takes} values that the "
                "network takes: correct features or context",
                {"features": self.features, "context": self.context, "takes": self.network.features},
            )
        try:
            _ = self.state
        except InvalidStateSpec as error:
            raise PydanticCustomError("state", "{why}", {"why": str(error)}) from None
        return self

    @property
    def outputs(self) -> int:
        return int(self.network.outputs)

    @property
    def state(self) -> StateSpec:
        return StateSpec((*self.network.state.leaves, Leaf(CONTEXT, (self.context,), DTYPES["float32"])))

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = self.network.tensor_shapes()
        return shapes

    def tensor_dtype(self, tensor: str) -> str:
        return str(self.network.tensor_dtype(tensor))

    def in_words(self) -> str:
        """`160 features → context of 352 values → GRU 64`."""
        _, *network = self.network.in_words().split(" → ")
        return " → ".join([f"{self.features} features", f"context of {self.context} values", *network])

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        network = self.network.as_json(defaults=defaults)
        return {"kind": self.kind, "features": self.features, "context": self.context, "network": network}


def form_of(description: PipelineDescription) -> Form:
    """The normal form."""
    from instep.models.registry import normal_form

    form = normal_form(description.network)
    features, size = description.features, description.context
    b = Builder()
    x = b.input("float32", (features,))
    *leaves, context = [b.input(leaf.dtype.name, leaf.shape) for leaf in description.state.leaves]
    both = b.fresh("float32", (size + features,))
    b.map("copy", context, out=narrow(both, 0, 0, size))
    b.map("copy", x, out=narrow(both, 0, size, features))
    return b.form([*b.inline(form, [both, *leaves]), narrow(both, 0, features, size)])


def forward_of(model: Model, device: torch.device) -> Forward | None:
    """The network as a module of torch, with its context."""
    import torch

    from instep.models.registry import torch_network

    description, inside = _parts(model)
    network = torch_network(inside, device)
    if network is None:
        return None
    features, size = description.features, description.context

    def forward(x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        signals = torch.cat([leaves[CONTEXT], x.transpose(0, 1).flatten(1)], 1)
        frames = signals.unfold(1, size + features, features).transpose(0, 1).contiguous()
        y, after = network.forward(frames, {leaf.name: leaves[leaf.name] for leaf in network.state.leaves})
        return y, {**after, CONTEXT: signals[:, -size:]}

    return forward


def reference_of(model: Model, dtype: type[np.floating[Any]]) -> Reference | None:
    """The network's reference, with its context."""
    from instep.models.registry import reference

    description, inside = _parts(model)
    network = reference(inside, dtype)
    return None if network is None else PipelineReference(description, network, dtype)


class PipelineReference:
    """A `Reference`."""

    def __init__(self, description: PipelineDescription, network: Reference, dtype: type[np.floating[Any]]) -> None:
        self.independent = network.independent
        self._description, self._network, self._dtype = description, network, dtype

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        features, size = self._description.features, self._description.context
        signals = np.concatenate([state[CONTEXT], x.swapaxes(0, 1).reshape(x.shape[1], -1)], 1, dtype=self._dtype)
        frames = np.lib.stride_tricks.sliding_window_view(signals, size + features, axis=1)[:, ::features]
        inside = {name: leaf for name, leaf in state.items() if name != CONTEXT}
        y, after = self._network.run(np.ascontiguousarray(frames.swapaxes(0, 1)), inside, active)
        ends = [features * int((active > row).sum()) for row in range(len(signals))]
        return y, {
            **after,
            CONTEXT: np.stack([each[end : end + size] for each, end in zip(signals, ends, strict=True)]),
        }


def _parts(model: Model) -> tuple[PipelineDescription, Model]:
    from instep.models.model import Model

    assert isinstance(model.description, PipelineDescription)
    return model.description, Model(model.name, model.description.network, model.weights)
