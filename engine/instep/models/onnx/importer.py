"""`instep model import net.onnx`: a model folder of a graph in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names, graph_bytes, write_model
from instep.models.model import Model
from instep.models.module.description import ModuleDescription
from instep.models.network import PortableNetwork
from instep.models.onnx.chain import chain_of_graph
from instep.models.onnx.description import OnnxDescription
from instep.models.onnx.graph import nodes_of, open_session, parse
from instep.models.onnx.layer_nodes import RECURRENT
from instep.models.onnx.matching import Hints, check_names, describe, pairs
from instep.models.onnx.reader import compare, read_onnx
from instep.models.portable.network import unpacked
from instep.models.weights import check_weights


def import_onnx(
    file: str | Path,
    folder: str | Path,
    hints: Hints = Hints(),  # noqa: B008
    *,
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write a graph in ONNX as a model folder.

    A step graph, which takes a frame and a state, becomes a step (`module`) in its normal form, and is compared with
    onnxruntime, which serving does not need. A graph over whole sequences, whose GRU, LSTM or RNN nodes hide their
    state, becomes a kind of these names.

    Args:
        file: the graph; nothing in it is trusted.
        folder: where to write it; made if it does not exist.
        hints: what the graph does not say.
        name: what clients are told; the folder's name if None.
        outputs: a name for each output; none if they have no names.
        overwrite: replace a model that the folder holds.

    Raises:
        ModelError: with what cannot be served, and what to do. Nothing is written then.
    """
    file, folder = Path(file), Path(folder)
    content = graph_bytes(file)
    source, name = str(file), folder.resolve().name if name is None else name
    graph = parse(content, source)
    session = open_session(content, source)
    inputs, given = ([each.name for each in all_of] for all_of in (session.get_inputs(), session.get_outputs()))
    recurrent = any(node.op_type in RECURRENT for node in nodes_of(graph.graph))
    check_names(hints, inputs, given, source)
    if pairs(inputs, given, hints):
        model = _step(content, describe(session, hints, source), source, check_name(name), outputs)
    elif recurrent:
        model = chain_of_graph(graph, session, hints, source).model(name, outputs)
    else:
        raise ModelError(
            f"{source} has no state: no input and output have similar names, as h and hn, and it holds no GRU, LSTM or "
            "RNN; export a graph of one step, with the state as inputs and outputs, or name them: --state INPUT=OUTPUT"
        )
    write_model(folder, model, overwrite=overwrite)
    return model


def _step(content: bytes, graph: OnnxDescription, source: str, name: str, outputs: Sequence[str]) -> Model:
    traced = read_onnx(content, graph, source)
    leaves = [{"name": leaf.name, "shape": leaf.of_row.shape, "dtype": leaf.dtype} for leaf in graph.leaves]
    description = ModuleDescription.model_validate({"features": graph.features, "state": leaves, "form": traced.form})
    weights = {tensor: values.reshape(-1) for tensor, values in traced.constants.items()}
    check_weights(weights, description, source)
    model = Model(name, description, weights, check_output_names(list(outputs), description))
    network = PortableNetwork(model)

    def step(arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        x, *before = arrays
        shaped = {
            leaf.name: values.reshape(-1, *leaf.shape) for leaf, values in zip(model.state.leaves, before, strict=True)
        }
        y, after = network.step(x, model.state.pack(shaped))
        return [y, *unpacked(model.state, after)]

    compare(step, content, graph, source)
    return model
