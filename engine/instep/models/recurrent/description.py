"""Descriptions of recurrent networks: layers over a frame's values, a GRU, LSTM or RNN, and further layers."""
# ruff: noqa: D102 - see `Description`

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, StrictBool, WrapValidator

from instep.models.base import LEARNED, Leaf, PlainFields, Shape, StateSpec
from instep_client.protocol.state_spec import DTYPES

Activation: TypeAlias = Literal[
    "none", "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "softplus", "softmax"
]
"""The torch functions of these names, with default parameters; softmax is over the layer's values for a frame."""
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)
Nonlinearity: TypeAlias = Literal["tanh", "relu"]
Size: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
LayerCount: TypeAlias = Annotated[int, Field(ge=1, le=1024, strict=True)]

BIDIRECTIONAL = (
    "a bidirectional {} cannot stream: its backward direction starts at the last frame, "
    "which a live stream has not sent yet; train one with bidirectional=False"
)
PROJECTION = (
    "an LSTM with projections cannot be served: train one with proj_size=0, and put an nn.Linear behind it if its "
    "outputs should be fewer"
)


_BY_LETTERS: Final = {name.replace("_", ""): name for name in ACTIVATIONS}


def activation_name(value: object) -> object:
    """The name that another spelling means, such as `leaky_relu` for `LeakyReLU`; other values stay as they are."""
    return _BY_LETTERS.get(value.lower().replace("_", ""), value) if isinstance(value, str) else value


class DenseLayer(PlainFields):
    """A linear layer with `size` outputs and the activation after it."""

    size: Size
    activation: Annotated[Activation, BeforeValidator(activation_name)] = "none"
    bias: StrictBool = True

    def outputs(self, inputs: int) -> int:
        """The number of outputs for `inputs` values."""
        return self.size

    def tensor_shapes(self, inputs: int) -> dict[str, Shape]:
        """Its tensors, as an `nn.Linear` names them."""
        return {"weight": (self.size, inputs)} | ({"bias": (self.size,)} if self.bias else {})

    def in_words(self) -> str:
        """`dense 64 relu`."""
        return _with_activation(f"dense {self.size}", self.activation)


class NormLayer(PlainFields):
    """An `nn.LayerNorm` over the values of a frame, and the activation after it."""

    layer_norm: Literal[True]
    """This key distinguishes the layer from a dense one."""
    activation: Annotated[Activation, BeforeValidator(activation_name)] = "none"
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    elementwise_affine: StrictBool = True
    bias: StrictBool = True

    def outputs(self, inputs: int) -> int:
        """The number of outputs for `inputs` values."""
        return inputs

    def tensor_shapes(self, inputs: int) -> dict[str, Shape]:
        """Its tensors, as an `nn.LayerNorm` names them."""
        names = ("weight", "bias") if self.bias else ("weight",)
        return dict.fromkeys(names, (inputs,)) if self.elementwise_affine else {}

    def in_words(self) -> str:
        """`layer norm relu`."""
        return _with_activation("layer norm", self.activation)


def _layer(value: object, _: object) -> DenseLayer | NormLayer:
    """Choose the kind of layer first, so that errors name its keys only."""
    if isinstance(value, NormLayer) or (isinstance(value, Mapping) and "layer_norm" in value):
        return NormLayer.model_validate(value)
    return DenseLayer.model_validate(value)


FrameLayer: TypeAlias = Annotated[DenseLayer | NormLayer, WrapValidator(_layer)]
"""A layer that processes one frame at a time."""


class RecurrentLayers(PlainFields):
    """The torch module of this name, in one direction and with any number of layers."""

    NAME: ClassVar[str]
    GATES: ClassVar[int]
    """The rows of the weights for each hidden unit."""
    LEAVES: ClassVar[tuple[str, ...]] = ("h",)
    """The leaves of its state, float32 [num_layers, hidden_size] each."""

    hidden_size: Size
    num_layers: LayerCount = 1
    bias: StrictBool = True

    def tensor_shapes(self, inputs: int) -> dict[str, Shape]:
        """Its tensors, by torch's names."""
        shapes: dict[str, Shape] = {}
        rows = self.GATES * self.hidden_size
        for layer in range(self.num_layers):
            shapes[f"weight_ih_l{layer}"] = (rows, inputs if layer == 0 else self.hidden_size)
            shapes[f"weight_hh_l{layer}"] = (rows, self.hidden_size)
            if self.bias:
                shapes[f"bias_ih_l{layer}"] = shapes[f"bias_hh_l{layer}"] = (rows,)
        return shapes

    def in_words(self) -> str:
        """`GRU 128 × 2 layers`."""
        return f"{self.NAME} {self.hidden_size}" + (f" × {self.num_layers} layers" if self.num_layers > 1 else "")


class GruLayers(RecurrentLayers):
    """An `nn.GRU`."""

    NAME, GATES = "GRU", 3


class LstmLayers(RecurrentLayers):
    """An `nn.LSTM`, which also keeps its cell states `c`."""

    NAME, GATES, LEAVES = "LSTM", 4, ("h", "c")


class RnnLayers(RecurrentLayers):
    """An `nn.RNN`."""

    NAME, GATES = "RNN", 1

    nonlinearity: Nonlinearity = "tanh"

    def in_words(self) -> str:
        """`RNN 128 relu`."""
        return super().in_words() + (" relu" if self.nonlinearity == "relu" else "")


class RecurrentDescription(PlainFields):
    """A frame of `features` values passes through `before`, the recurrent layers and `after`.

    The last layer's values are the output. The recurrent layers and their tensors are under the key that `kind` names.
    """

    kind: str
    features: Size
    before: tuple[FrameLayer, ...] = ()
    after: tuple[FrameLayer, ...] = ()
    initial_state: Literal["zeros", "learned"] = "zeros"
    """The leaves of a stream before its first frame; learned arrays are in the weights file."""

    @property
    def recurrent(self) -> RecurrentLayers:
        """The recurrent layers, of whichever kind."""
        layers: RecurrentLayers = getattr(self, self.kind)
        return layers

    @property
    def recurrent_inputs(self) -> int:
        """The number of inputs of the recurrent layers."""
        return _outputs(self.before, self.features)

    @property
    def outputs(self) -> int:
        return _outputs(self.after, self.recurrent.hidden_size)

    @property
    def state(self) -> StateSpec:
        """The leaves of the recurrent layers, float32 [num_layers, hidden_size] each."""
        layers = self.recurrent
        shape = (layers.num_layers, layers.hidden_size)
        initial = None if self.initial_state == "learned" else 0.0
        return StateSpec(tuple(Leaf(name, shape, DTYPES["float32"], initial) for name in layers.LEAVES))

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor of the weights file by name, in the order in which a frame meets them, with torch's shapes."""
        recurrent = self.recurrent.tensor_shapes(self.recurrent_inputs)
        # Not from the state: sizes are only known to be small once they were compared with the weights.
        shape = (self.recurrent.num_layers, self.recurrent.hidden_size)
        return {
            **_tensor_shapes("before", self.before, self.features),
            **{f"{self.kind}.{name}": shape for name, shape in recurrent.items()},
            **_tensor_shapes("after", self.after, self.recurrent.hidden_size),
            **{LEARNED + name: shape for name in self._learned},
        }

    @property
    def _learned(self) -> tuple[str, ...]:
        return self.recurrent.LEAVES if self.initial_state == "learned" else ()

    def tensor_dtype(self, tensor: str) -> str:
        return "float32"

    def in_words(self) -> str:
        """`40 features → GRU 128 → dense 10`."""
        layers = (*self.before, self.recurrent, *self.after)
        words = " → ".join([f"{self.features} features", *(layer.in_words() for layer in layers)])
        return words if self.initial_state == "zeros" else f"{words}, from a learned state"

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        values = self.model_dump(mode="json", exclude_defaults=not defaults)
        order = ["features", "before", self.kind, "after"]
        if self.initial_state != "zeros":  # models without it have the fingerprint that they had before there was one
            order.append("initial_state")
        return {"kind": self.kind} | {key: values[key] for key in order if key in values}


class GruDescription(RecurrentDescription):
    """A network around an `nn.GRU`."""

    kind: Literal["gru"] = "gru"
    gru: GruLayers


class LstmDescription(RecurrentDescription):
    """A network around an `nn.LSTM`."""

    kind: Literal["lstm"] = "lstm"
    lstm: LstmLayers


class RnnDescription(RecurrentDescription):
    """A network around an `nn.RNN`."""

    kind: Literal["rnn"] = "rnn"
    rnn: RnnLayers


DESCRIPTIONS: Final[dict[str, type[GruDescription | LstmDescription | RnnDescription]]] = {
    "gru": GruDescription,
    "lstm": LstmDescription,
    "rnn": RnnDescription,
}
"""Descriptions by kind."""


def _with_activation(words: str, activation: Activation) -> str:
    return words if activation == "none" else f"{words} {activation}"


def _outputs(layers: Sequence[FrameLayer], inputs: int) -> int:
    for layer in layers:
        inputs = layer.outputs(inputs)
    return inputs


def _tensor_shapes(place: str, layers: Sequence[FrameLayer], inputs: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for index, layer in enumerate(layers):
        shapes |= {f"{place}.{index}.{name}": shape for name, shape in layer.tensor_shapes(inputs).items()}
        inputs = layer.outputs(inputs)
    return shapes
