"""What single nodes are as layers, with their weights in torch's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from instep.models.handover.layers import FrameLayer, Recurrent, dense, layer_norm
from instep.models.onnx.graph import label
from instep.models.recurrent.description import Activation

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

RECURRENT: Final = frozenset(("GRU", "LSTM", "RNN"))
"""Names of operators. In lower case they are kinds of models."""
_GATES: Final = {
    "GRU": (1, 0, 2),  # update, reset, new: torch's order is reset, update, new
    "LSTM": (0, 2, 3, 1),  # input, output, forget, cell: torch's order is input, forget, cell, output
    "RNN": (0,),
}
"""Where torch's gates are among those of ONNX."""
_FUNCTIONS: Final = {
    "GRU": (["Sigmoid", "Tanh"],),
    "LSTM": (["Sigmoid", "Tanh", "Tanh"],),
    "RNN": (["Tanh"], ["Relu"]),
}
"""The activations of the gates that are served; the first are the default."""
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "Elu": "elu",
    "Gelu": "gelu",
    "LeakyRelu": "leaky_relu",
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "Softplus": "softplus",
    "Tanh": "tanh",
}
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "Elu": {"alpha": 1.0},
    "Gelu": {"approximate": b"none"},
    "LeakyRelu": {"alpha": 0.01},
}
"""Of torch; a node's attribute must have that value."""
LAYERS: Final = RECURRENT | {*_ACTIVATIONS, "Add", "Gemm", "LayerNormalization", "MatMul"}
"""Operators that are a layer or a part of one."""


class InTheWay(Exception):
    """A node that is not a layer that can be served; the message says which and why."""

    def __init__(self, node: NodeProto, why: str) -> None:
        super().__init__(f"{label(node)} is in the way: {why}")


class LayerNodes:
    """Reads the nodes of a graph; each method raises `InTheWay`.

    Args:
        graph: the graph.
        per_row: names of the tensors that depend on the frames.

    Attributes:
        producers: by the names of its outputs, every node.
    """

    def __init__(self, graph: ModelProto, per_row: set[str]) -> None:
        self.producers = {name: node for node in graph.graph.node for name in node.output}
        self._graph = graph
        self._per_row = per_row
        self._initializers = {tensor.name: tensor for tensor in graph.graph.initializer}

    def add(self, node: NodeProto, layers: list[FrameLayer], recurrent: Sequence[NodeProto]) -> None:
        """Add a layer, or what a node does to the last one of `layers`; those follow the nodes `recurrent`, if any."""
        if node.op_type in ("MatMul", "Gemm"):
            layers.append(self._dense(node))
        elif node.op_type == "LayerNormalization":
            layers.append(self._norm(node))
        elif node.op_type == "Add":
            layers[-1:] = [self._with_bias(node, layers)]
        else:
            layers[-1:] = self._activated(node, layers, recurrent)

    def _dense(self, node: NodeProto) -> FrameLayer:
        attributes = _attributes(node)
        weight = self._constant(node.input[1]) if node.input[0] in self._per_row else None
        plain = all(
            attributes.get(name, default) == default for name, default in (("alpha", 1), ("beta", 1), ("transA", 0))
        )
        if weight is None or weight.ndim != 2 or not plain:
            raise InTheWay(node, "it is not a product of rows with a constant matrix")
        bias = self._constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        weight = weight if attributes.get("transB") else weight.T
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1), len(weight))
        return dense(label(node), _tensor(weight), None if bias is None else _tensor(bias))

    def _norm(self, node: NodeProto) -> FrameLayer:
        weight, bias = (self._constant(name) if name else None for name in [*node.input, ""][1:3])
        if weight is None or weight.ndim != 1:
            raise InTheWay(node, "it is not over the values of a frame, with constant weights")
        eps = float(str(np.float32(_attributes(node).get("epsilon", 1e-5))))  # 1e-05, not the float32 next to it
        return layer_norm(label(node), weight.size, eps, _tensor(weight), None if bias is None else _tensor(bias))

    def _with_bias(self, node: NodeProto, layers: list[FrameLayer]) -> FrameLayer:
        bias = next((found for name in node.input if (found := self._constant(name)) is not None), None)
        last = layers[-1] if layers else None
        if bias is None or last is None or not last.is_dense or "bias" in last.tensors or last.activation != "none":
            raise InTheWay(node, "it adds to something that is not a product with a matrix")
        if bias.size not in (1, last.outputs):
            raise InTheWay(node, f"it adds {bias.size} values to {last.outputs}")
        return dense(last.label, last.tensors["weight"], _tensor(np.broadcast_to(bias.reshape(-1), last.outputs)))

    def _activated(self, node: NodeProto, layers: list[FrameLayer], recurrent: Sequence[NodeProto]) -> list[FrameLayer]:
        attributes = _attributes(node)
        for name, default in _DEFAULTS.get(node.op_type, {}).items():
            value = attributes.get(name, default)
            if value != default and not (isinstance(value, float) and np.isclose(value, default)):
                raise InTheWay(node, f"only {name} = {default} is served, not {value}")
        activation = _ACTIVATIONS.get(node.op_type, "silu")
        last = layers[-1:]
        if last and last[0].activation == "none":
            return [replace(last[0], activation=activation)]
        if not last and not recurrent:
            raise InTheWay(node, "it comes before any layer; compute it in the client")
        width = last[0].outputs if last else self._weights(recurrent[-1])[1].shape[1]
        return [*last, dense(label(node), torch.eye(width), None, activation)]  # which changes no value

    def recurrent(self, nodes: Sequence[NodeProto]) -> Recurrent:
        """Nodes that follow each other, as the layers of one."""
        first = nodes[0]
        tensors: dict[str, torch.Tensor] = {}
        layers = [self._weights(node) for node in nodes]
        size = layers[0][1].shape[1]
        has_bias = any(bias is not None for _, _, bias in layers)
        for at, (node, (of_input, of_state, bias)) in enumerate(zip(nodes, layers, strict=True)):
            if (node.op_type, _functions(node)) != (first.op_type, _functions(first)):
                raise InTheWay(node, f"it follows {label(first)}, and layers must be of one kind")
            rows, hidden = of_state.shape
            if hidden != size:
                raise InTheWay(node, f"its hidden size is {hidden}, that of {label(first)} is {size}")
            tensors[f"weight_ih_l{at}"], tensors[f"weight_hh_l{at}"] = _tensor(of_input), _tensor(of_state)
            if has_bias:
                both = np.zeros((2, rows), np.float32) if bias is None else bias
                tensors[f"bias_ih_l{at}"], tensors[f"bias_hh_l{at}"] = map(_tensor, both)
        options = {"nonlinearity": _functions(first)[0].lower()} if first.op_type == "RNN" else {}
        return Recurrent(label(first), first.op_type.lower(), tensors, options)

    def _weights(self, node: NodeProto) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Of the input [gates · H, I], of the state [gates · H, H], and biases of both [2, gates · H], as in torch."""
        attributes, kind = _attributes(node), node.op_type
        for unlike_torch, why in (
            (
                attributes.get("direction", b"forward") != b"forward",
                "it runs backward, from a frame that is not yet sent",
            ),
            (kind == "GRU" and not attributes.get("linear_before_reset"), "linear_before_reset must be 1, as in torch"),
            (_functions(node) not in _FUNCTIONS[kind], f"its activations must be {' and '.join(_FUNCTIONS[kind][0])}"),
            ("clip" in attributes, "it clips, which torch does not; train without"),
            (attributes.get("input_forget"), "input_forget must be 0, as in torch"),
        ):
            if unlike_torch:
                raise InTheWay(node, why)
        of_input, of_state, bias, lengths, *states, peepholes = [*node.input[1:], *[""] * 8][:7]
        if lengths or (kind == "LSTM" and peepholes):
            what = "the lengths of sequences (sequence_lens)" if lengths else "peepholes"
            raise InTheWay(node, f"it takes {what}; export it without")
        inputs = {each.name for each in self._graph.graph.input}
        for name in filter(None, states):
            start = self._constant(name)
            if name in inputs or (start is not None and start.any()):
                raise InTheWay(node, "its initial state is not zero: export one step, with the state as an input")
        found = [self._constant(name) if name else None for name in (of_input, of_state, bias)]
        if found[0] is None or found[1] is None or (bias and found[2] is None):
            raise InTheWay(node, "its weights are not constant")
        biases = None if found[2] is None else _in_torchs_order(found[2].reshape(2, -1), kind, axis=1)
        return _in_torchs_order(found[0][0], kind), _in_torchs_order(found[1][0], kind), biases

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        """The value of a tensor that depends on no input; None of one that does."""
        from onnx import helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        node = self.producers.get(name)
        if node is None or name in self._per_row or any(attribute.HasField("g") for attribute in node.attribute):
            return None
        values = {each: self._constant(each) for each in node.input if each}
        if any(value is None for value in values.values()):
            return None
        inputs = [helper.make_tensor_value_info(each, 0, None) for each in values]
        outputs = [helper.make_tensor_value_info(name, 0, None)]
        alone = helper.make_graph([node], "constant", inputs, outputs)
        model = helper.make_model(alone, opset_imports=self._graph.opset_import)
        [found] = ReferenceEvaluator(model).run(None, values)
        return np.asarray(found)


def _attributes(node: NodeProto) -> Mapping[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _functions(node: NodeProto) -> list[str]:
    """The activations of a recurrent node's gates."""
    given = _attributes(node).get("activations")
    return _FUNCTIONS[node.op_type][0] if given is None else [name.decode() for name in given]


def _in_torchs_order(values: npt.NDArray[Any], kind: str, axis: int = 0) -> npt.NDArray[Any]:
    gates = np.split(values, len(_GATES[kind]), axis)
    return np.concatenate([gates[at] for at in _GATES[kind]], axis)


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, order="C"))
