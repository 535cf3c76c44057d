"""The description of a pipeline: steps on frames, a network of another kind, steps on its outputs."""
# ruff: noqa: D102 - see `Description`

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from pydantic_core import PydanticCustomError

from instep.models.base import Description, Leaf, PlainFields, Shape, StateSpec
from instep.models.errors import ModelError
from instep.models.pipeline.steps import FrameStep, parse_step, sizes
from instep_client.protocol.state_spec import InvalidStateSpec

AnyStep: TypeAlias = Annotated[SerializeAsAny[FrameStep], BeforeValidator(parse_step)]
PLACES: Final = ("before", "after")


class PipelineDescription(PlainFields):
    """Frames of `features` values go through `before`, the network and `after`."""

    kind: Literal["pipeline"] = "pipeline"
    features: Annotated[int, Field(ge=1, strict=True)]
    before: tuple[AnyStep, ...] = ()
    network: Any
    """A `Description` of any other kind; `model.yaml` holds its keys."""
    after: tuple[AnyStep, ...] = ()

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
    def _fit(self) -> PipelineDescription:
        given = sizes(self.before, self.features)[-1]
        if given != self.network.features:
            raise PydanticCustomError(
                "sizes",
                "frames of {features} values are {given} values after the steps before the network, which takes "
                "{takes}: correct features, the steps or the network",
                {"features": self.features, "given": given, "takes": self.network.features},
            )
        if not self.before and not self.after:
            raise PydanticCustomError("steps", "a pipeline without steps is its network: describe that alone")
        try:
            _ = self.state
        except InvalidStateSpec as error:
            raise PydanticCustomError("state", "{why}", {"why": str(error)}) from None
        return self

    @property
    def outputs(self) -> int:
        return sizes(self.after, self.network.outputs)[-1]

    @property
    def state(self) -> StateSpec:
        """The leaves of the network, and those of each step as `before.0.context`."""
        of_steps = (
            Leaf(leaf_name(place, index, leaf.name), leaf.shape, leaf.dtype, leaf.initial)
            for place, index, step, inputs in self.steps()
            for leaf in step.leaves(inputs)
        )
        return StateSpec((*self.network.state.leaves, *of_steps))

    def steps(self) -> Iterator[tuple[str, int, FrameStep, int]]:
        """Every step with its place, its index there, and the values per frame it takes."""
        for place, inputs in zip(PLACES, (self.features, self.network.outputs), strict=True):
            steps: tuple[FrameStep, ...] = getattr(self, place)
            for index, (step, size) in enumerate(zip(steps, sizes(steps, inputs), strict=False)):
                yield place, index, step, size

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = self.network.tensor_shapes()
        return shapes

    def tensor_dtype(self, tensor: str) -> str:
        return str(self.network.tensor_dtype(tensor))

    def in_words(self) -> str:
        """`160 features → context of 352 values → log power spectrum → GRU 64 → smooth 0.9`."""
        _, *network = self.network.in_words().split(" → ")
        before, after = ([step.in_words() for step in steps] for steps in (self.before, self.after))
        return " → ".join([f"{self.features} features", *before, *network, *after])

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        fields: dict[str, Any] = {"kind": self.kind, "features": self.features}
        for place in PLACES:
            fields[place] = [
                {step.name: step.model_dump(mode="json", exclude_defaults=not defaults)}
                for step in getattr(self, place)
            ]
        network = self.network.as_json(defaults=defaults)
        ordered = {"before": fields.pop("before"), "network": network, "after": fields.pop("after")}
        return fields | {key: value for key, value in ordered.items() if value or defaults}


def leaf_name(place: str, index: int, name: str) -> str:
    """`before.0.context`."""
    return f"{place}.{index}.{name}"
