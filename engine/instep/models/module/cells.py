"""The recurrent cells of a graph, stepped by hand in memory that stays where it is; see `recurrent.cell`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from instep.models.module.graph import Graph, references
from instep.models.recurrent.cell import Cell, LayerWeights, Products, Recurrence
from instep.models.recurrent.gru import Gru
from instep.models.recurrent.lstm import Lstm
from instep.models.recurrent.rnn import Rnn

_RECURRENCES: Final[dict[str, Callable[[], Recurrence]]] = {
    "aten.gru_cell.default": Gru,
    "aten.lstm_cell.default": Lstm,
    "aten.rnn_relu_cell.default": partial(Rnn, "relu"),
    "aten.rnn_tanh_cell.default": partial(Rnn, "tanh"),
}


@dataclass(frozen=True, slots=True)
class CellCall:
    """A node that calls a cell, such as `aten.gru_cell`, with weights of the model."""

    recurrence: Recurrence
    weights: LayerWeights
    in_place: bool
    """Its states are leaves that nothing else uses, so they may change."""


def cell_calls(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, CellCall]:
    """By the names of their nodes, the cells that are worth stepping by hand."""
    found = {}
    used = Counter(references([graph.y, graph.new_state, [[n.args, n.kwargs] for n in graph.nodes]], "state"))
    for node in graph.nodes:
        if node.op not in _RECURRENCES or node.kwargs:
            continue
        given: list[Any] = [*node.args[2:], None, None]
        names = [each.get("tensor") if isinstance(each, dict) else None for each in given[:4]]
        if any(name is None and each is not None for name, each in zip(names, given, strict=False)):
            continue  # weights that the step computes
        input_weight, state_weight, *biases = (None if name is None else weights[name] for name in names)
        recurrence = _RECURRENCES[node.op]()
        if input_weight is None or state_weight is None or state_weight.shape[-1] % recurrence.width_multiple:
            continue
        if {input_weight.dtype, state_weight.dtype} != {torch.float32}:
            continue
        states = node.args[1] if isinstance(node.args[1], list) else [node.args[1]]
        leaves = list(references(states, "state"))
        in_place = len(leaves) == len(states) and all(used[leaf] == 1 for leaf in leaves)
        weights_of_cell = LayerWeights(input_weight.t(), state_weight.t(), *biases)
        found[node.name] = CellCall(recurrence, weights_of_cell, in_place)
    return found


class BoundCell:
    """Such a call with memory of its own, which a graph returns from it; the next call changes it."""

    def __init__(self, call: CellCall, *, adds_biases: bool) -> None:
        self._call = call
        self._adds_biases = adds_biases
        self.leaves: tuple[torch.Tensor, ...] = ()
        """The states that the last call returned, [rows, width]."""
        self._cell: Cell

    def run(self, x: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the cell on frames [rows, inputs] and states [rows, width]: the new state, or both of them."""
        if not self.leaves or len(x) != len(self.leaves[0]):
            self._make_room(states)
        if not self._call.in_place:
            for leaf, state in zip(self.leaves, states, strict=True):
                leaf.copy_(state)
        self._cell.run(x)
        return self.leaves if len(self.leaves) > 1 else self.leaves[0]

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def _make_room(self, states: Sequence[torch.Tensor]) -> None:
        gates = self._call.weights.state_weight.shape[1]
        self.leaves = tuple(state if self._call.in_place else torch.zeros(state.shape) for state in states)
        room = torch.empty(2, len(states[0]), gates)
        products = Products(self._call.weights, room, adds_biases=self._adds_biases)
        self._cell = self._call.recurrence.cell(products, dict(zip("hc", self.leaves, strict=False)))
