"""The description of a GRU network: dense layers, a GRU, dense layers."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, field_validator
from pydantic_core import PydanticCustomError

from instep.models.base import Leaf, Shape, StateSpec
from instep_client.protocol.state_spec import DTYPES

Activation: TypeAlias = Literal[
    "none", "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "softplus", "softmax"
]
"""Torch's functions of these names with their default parameters; softmax is over the layer's values of a frame."""
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)
Size: TypeAlias = Annotated[int, Field(ge=1, strict=True)]

BIDIRECTIONAL = (
    "a bidirectional GRU cannot stream: its backward direction starts at the last frame, "
    "which a live stream has not sent yet; train one with bidirectional=False"
)


_BY_LETTERS: Final = {name.replace("_", ""): name for name in ACTIVATIONS}


def activation_name(value: object) -> object:
    """The name that was meant, as `leaky_relu` by `LeakyReLU`; anything else as it is."""
    return _BY_LETTERS.get(value.lower().replace("_", ""), value) if isinstance(value, str) else value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseLayer(_Frozen):
    """A linear layer with `size` outputs and the activation after it."""

    size: Size
    activation: Annotated[Activation, BeforeValidator(activation_name)] = "none"
    bias: StrictBool = True

    def in_words(self) -> str:
        """`dense 64 relu`."""
        return f"dense {self.size}" if self.activation == "none" else f"dense {self.size} {self.activation}"


class GruLayers(_Frozen):
    """An `nn.GRU`: one direction, any number of layers."""

    hidden_size: Size
    num_layers: Size = 1
    bias: StrictBool = True
    bidirectional: StrictBool = False

    @field_validator("bidirectional")
    @classmethod
    def _one_direction(cls, value: bool) -> bool:
        if value:
            raise PydanticCustomError("bidirectional", BIDIRECTIONAL)
        return value


class GruDescription(_Frozen):
    """Frames of `features` values go through `before`, the GRU and `after`; the last layer's values are the output."""

    kind: Literal["gru"] = "gru"
    features: Size
    before: tuple[DenseLayer, ...] = ()
    gru: GruLayers
    after: tuple[DenseLayer, ...] = ()

    @property
    def gru_input_size(self) -> int:
        """Values the GRU takes per frame."""
        return self.before[-1].size if self.before else self.features

    @property
    def outputs(self) -> int:
        """Values per frame that the network answers."""
        return self.after[-1].size if self.after else self.gru.hidden_size

    @property
    def state(self) -> StateSpec:
        """One leaf `h`, the hidden states of all layers: float32 [num_layers, hidden_size], zeros at first."""
        return StateSpec((Leaf("h", (self.gru.num_layers, self.gru.hidden_size), DTYPES["float32"]),))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor of the weights file by name, in the order in which a frame meets them, with torch's shapes."""
        hidden = self.gru.hidden_size
        shapes = _dense_shapes("before", self.before, self.features)
        for layer in range(self.gru.num_layers):
            inputs = self.gru_input_size if layer == 0 else hidden
            shapes[f"gru.weight_ih_l{layer}"] = (3 * hidden, inputs)
            shapes[f"gru.weight_hh_l{layer}"] = (3 * hidden, hidden)
            if self.gru.bias:
                shapes[f"gru.bias_ih_l{layer}"] = (3 * hidden,)
                shapes[f"gru.bias_hh_l{layer}"] = (3 * hidden,)
        return shapes | _dense_shapes("after", self.after, hidden)

    def fan_in(self, tensor: str) -> int:
        """As torch initialises: the hidden size for every tensor of the GRU, a dense layer's inputs for its own."""
        layer, _, _ = tensor.rpartition(".")
        return self.gru.hidden_size if layer == "gru" else self.tensor_shapes()[f"{layer}.weight"][1]

    def in_words(self) -> str:
        """`40 features → GRU 128 → dense 10`."""
        gru = f"GRU {self.gru.hidden_size}" + (f" × {self.gru.num_layers} layers" if self.gru.num_layers > 1 else "")
        before, after = ([layer.in_words() for layer in layers] for layers in (self.before, self.after))
        return " → ".join([f"{self.features} features", *before, gru, *after])

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        """As plain JSON values, always with `kind`."""
        return {"kind": self.kind, **self.model_dump(mode="json", exclude_defaults=not defaults)}


def _dense_shapes(place: str, layers: tuple[DenseLayer, ...], inputs: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for index, layer in enumerate(layers):
        shapes[f"{place}.{index}.weight"] = (layer.size, inputs)
        if layer.bias:
            shapes[f"{place}.{index}.bias"] = (layer.size,)
        inputs = layer.size
    return shapes
