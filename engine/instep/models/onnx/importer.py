"""`instep model import net.onnx`: a model folder of a graph in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names, graph_bytes, write_model
from instep.models.model import Model
from instep.models.onnx.chain import chain_of_graph
from instep.models.onnx.graph import nodes_of, open_session, parse
from instep.models.onnx.layer_nodes import RECURRENT
from instep.models.onnx.matching import Hints, check_names, describe, pairs
from instep.models.onnx.rows import check_rows


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

    A step graph, which takes a frame and a state, is kept as it is and becomes the kind `onnx`. A graph over whole
    sequences, whose GRU, LSTM or RNN nodes hide their state, becomes a kind of these names.

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
        description = describe(session, hints, source)
        per_row = {tensor.name for tensor in description.graph_inputs[: 1 + len(description.leaves)]}
        check_rows(graph, per_row, source, description)
        names = check_output_names(list(outputs), description)
        model = Model(check_name(name), description, {}, names, content)
    elif recurrent:
        model = chain_of_graph(graph, session, hints, source).model(name, outputs)
    else:
        raise ModelError(
            f"{source} has no state: no input and output have similar names, as h and hn, and it holds no GRU, LSTM or "
            "RNN; export a graph of one step, with the state as inputs and outputs, or name them: --state INPUT=OUTPUT"
        )
    write_model(folder, model, overwrite=overwrite)
    return model
