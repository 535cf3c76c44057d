"""GRU, LSTM and RNN nodes that hide their state in a graph over whole sequences, read back as layers.

The graph is followed from its answer back to its frames. A step of the way may only be a layer that a model folder
holds, or a change of layout; whatever else there is, stands in the way and is named. What the layers give is compared
with what onnxruntime gives, so a layout that was misread is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from instep.models.agreement import agreement
from instep.models.errors import ModelError
from instep.models.handover.layers import SERVED, Chain, FrameLayer
from instep.models.onnx.graph import label
from instep.models.onnx.layer_nodes import LAYERS, RECURRENT, InTheWay, LayerNodes
from instep.models.onnx.matching import Hints
from instep.models.registry import build

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_LAYOUT: Final = frozenset(("Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_TIMESTEPS: Final = 24


def chain_of_graph(graph: ModelProto, session: Any, hints: Hints, source: str) -> Chain:
    """The layers of a graph over whole sequences, compared with it.

    Raises:
        ModelError: naming the node that stands in the way.
    """
    frame = _frame(session, source)
    answer = _answer(session, hints, source)
    try:
        chain = _Reader(graph, frame.name, source).chain(answer)
    except InTheWay as error:
        raise ModelError(f"{source} is not a chain of layers that can be served: {error}") from None
    _check(chain, session, frame, answer, source)
    return chain


class _Reader:
    """Reads a graph backwards."""

    def __init__(self, graph: ModelProto, frame: str, source: str) -> None:
        self._graph = graph
        self._frame = frame
        self._source = source
        self._of_frames = _depending_on(frame, graph.graph)
        self._layers = LayerNodes(graph, self._of_frames)
        self._producers = self._layers.producers

    def chain(self, answer: str) -> Chain:
        """The layers from the frame to the answer."""
        before: list[FrameLayer] = []
        recurrent: list[NodeProto] = []
        after: list[FrameLayer] = []
        for node in self._nodes(answer):
            layers = after if recurrent else before
            if node.op_type not in RECURRENT:
                self._layers.add(node, layers, recurrent)
            elif after:
                raise InTheWay(node, f"it comes after {after[-1].label}, which comes after {label(recurrent[0])}")
            else:
                recurrent.append(node)
        if not recurrent:
            raise ModelError(f"{self._source} holds no GRU, LSTM or RNN between its frames and {answer!r:.80}")
        return Chain(before, self._layers.recurrent(recurrent), after)

    def _nodes(self, answer: str) -> list[NodeProto]:
        """The nodes on the way, from the frame to the answer, changes of layout left out."""
        found, name = [], answer
        while name != self._frame:
            node = self._producers.get(name)
            if node is None or name not in self._of_frames:
                raise ModelError(
                    f"{answer!r:.80} of {self._source} does not depend on {self._frame!r:.80}: name others"
                )
            given = [each for each in dict.fromkeys(node.input) if each in self._of_frames]
            if (inner := self._gated(node, given)) is not None:
                given = [inner]
            elif node.op_type not in _LAYOUT | LAYERS:
                raise InTheWay(node, SERVED)
            if len(given) > 1:
                raise InTheWay(node, f"it takes values from two places, {' and '.join(map(repr, given)):.200}")
            if node.op_type not in _LAYOUT:
                found.append(node)
            name = given[0]
        return found[::-1]

    def _gated(self, node: NodeProto, given: Sequence[str]) -> str | None:
        """For x · σ(x), which is silu, the name of x."""
        for one, other in (given, given[::-1]) if node.op_type == "Mul" and len(given) == 2 else ():
            gate = self._producers.get(other)
            if gate is not None and gate.op_type == "Sigmoid" and list(gate.input) == [one]:
                return one
        return None


def _frame(session: Any, source: str) -> Any:
    inputs = session.get_inputs()
    if len(inputs) > 1:
        others = ", ".join(each.name for each in inputs)
        raise ModelError(
            f"{source} has inputs that match no output, {others:.300}: name the state with --state INPUT=OUTPUT, and "
            "what is always the same with --constant NAME=VALUE"
        )
    return inputs[0]


def _answer(session: Any, hints: Hints, source: str) -> str:
    outputs = [each.name for each in session.get_outputs()]
    if hints.answer is None and len(outputs) > 1:
        raise ModelError(
            f"{source} has several outputs, {', '.join(outputs):.300}: say which one is answered with --answer NAME"
        )
    return hints.answer or outputs[0]


def _depending_on(frame: str, graph: GraphProto) -> set[str]:
    """The tensors that depend on the frames' values; shapes do not."""
    found = {frame}
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and found & {*node.input}:
            found |= {*node.output}
    return found


def _check(chain: Chain, session: Any, frame: Any, answer: str, source: str) -> None:
    """Compare what would be served with what the graph gives for random sequences."""
    network = build(chain.model("check"), torch.device("cpu"))
    shape = [each if isinstance(each, int) else _TIMESTEPS for each in frame.shape]
    shape[-1] = network.description.features
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    try:
        y = session.run([answer], {frame.name: x})[0]
    except Exception as error:  # onnxruntime's errors have no common class
        raise ModelError(f"onnxruntime cannot run {source} for frames {list(x.shape)}: {error!s:.300}") from None
    found = agreement(network, x, y)
    if found is None or not found.agrees:
        how = "its outputs have another shape" if found is None else f"they differ by {found.error:.1e}"
        raise ModelError(
            f"the layers of {source} do not give what the graph gives, {how}: a change of layout between them may mix "
            "timesteps, or an initial state is not zero; hand over the torch module instead"
        )
