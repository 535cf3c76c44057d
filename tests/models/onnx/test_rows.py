"""Graphs in which a row chooses or weighs values of other rows, but only with values of its own that no trial draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.onnx.importer import import_onnx
from instep.models.registry import build
from tests.support.onnx_graphs import INT64, floats, graph, ints, node
from tests.support.running import CPU

CONSTANTS = {
    "zero": ints(0),
    "one": ints(1),
    "two": ints(2),
    "halves": ints(-1, 2, 2),
    "whole": ints(-1, 4),
    "eye": np.eye(4, dtype=np.float32),
    "rare": floats(1e9),
}
INDICES = [node("Floor", ["x"], ["floor"]), node("Cast", ["floor"], ["i"], to=INT64)]
FIRST = [*INDICES, node("Slice", ["i", "zero", "one", "one"], ["j"])]

APART = {
    "GatherElements": [*INDICES, node("GatherElements", ["x", "i"], ["w"], axis=-1)],
    "ScatterElements": [*INDICES, node("ScatterElements", ["x", "i", "h"], ["w"], axis=1)],
    "GatherND": [*FIRST, node("GatherND", ["x", "j"], ["a"], batch_dims=1), node("Unsqueeze", ["a", "one"], ["w"])],
    "MatMul": [
        node("Unsqueeze", ["x", "two"], ["column"]),
        node("Unsqueeze", ["h", "one"], ["row"]),
        node("MatMul", ["column", "row"], ["products"]),
        node("MatMul", ["row", "products"], ["a"]),
        node("Squeeze", ["a", "one"], ["w"]),
    ],
    "MatMul between reshapes": [
        node("Reshape", ["x", "halves"], ["a"]),
        node("Reshape", ["h", "halves"], ["b"]),
        node("MatMul", ["a", "b"], ["c"]),
        node("Reshape", ["c", "whole"], ["w"]),
    ],
    "MatMul with weights": [node("MatMul", ["x", "eye"], ["w"])],
    "Gemm with a bias of rows": [node("Gemm", ["x", "eye", "h"], ["w"])],
    "Einsum": [node("Einsum", ["x", "h", "eye"], ["w"], equation="ai,ai,ij->aj")],
}
TOGETHER = {
    "GatherElements": [*INDICES, node("GatherElements", ["x", "i"], ["w"], axis=0)],
    "ScatterElements": [*INDICES, node("ScatterElements", ["x", "i", "h"], ["w"], axis=0)],
    "GatherND": [*FIRST, node("GatherND", ["x", "j"], ["w"])],
    "ScatterND": [*FIRST, node("ScatterND", ["x", "j", "h"], ["w"])],
    "MatMul": [
        node("Transpose", ["h"], ["across"]),
        node("MatMul", ["x", "across"], ["a"]),
        node("MatMul", ["a", "x"], ["w"]),
    ],
    "Gemm": [node("Gemm", ["x", "h"], ["a"], transB=1), node("Gemm", ["a", "x"], ["w"])],
    "Einsum": [
        node("Einsum", ["x", "h"], ["a"], equation="ai,bi->ab"),
        node("Einsum", ["a", "x"], ["w"], equation="ab,bi->ai"),
    ],
}


def seldom(middle: list[onnx.NodeProto]) -> bytes:
    """y = hn = 0.5 · h + x, and w in place of x where that is rare."""
    nodes = [
        *middle,
        node("Greater", ["x", "rare"], ["is_rare"]),
        node("Where", ["is_rare", "w", "x"], ["v"]),
        node("Mul", ["h", "half"], ["kept"]),
        node("Add", ["kept", "v"], ["hn"]),
        node("Identity", ["hn"], ["y"]),
    ]
    used = {name for each in nodes for name in each.input}
    constants = {name: value for name, value in CONSTANTS.items() if name in used} | {"half": floats(0.5)}
    state = {"x": ["rows", 4], "h": ["rows", 4]}
    model = graph(nodes, state, {"y": ["rows", 4], "hn": ["rows", 4]}, constants)  # type: ignore[arg-type]
    return model.SerializeToString()


@pytest.mark.parametrize("case", APART)
def test_operators_that_keep_rows_apart_are_served(tmp_path: Path, case: str) -> None:
    (tmp_path / "net.onnx").write_bytes(seldom(APART[case]))
    import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    build(load_model(tmp_path / "net"), CPU)


@pytest.mark.parametrize("operator", TOGETHER)
def test_operators_that_may_combine_rows_are_refused(tmp_path: Path, operator: str) -> None:
    (tmp_path / "net.onnx").write_bytes(seldom(TOGETHER[operator]))
    with pytest.raises(
        ModelError, match=rf"with {operator} \('\w+'\), one row may choose or weigh values of the others"
    ):
        import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_folder_is_checked_as_an_import_is(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(seldom(APART["MatMul"]))
    import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    (tmp_path / "net" / "graph.onnx").write_bytes(seldom(TOGETHER["MatMul"]))
    with pytest.raises(ModelError, match=r"with MatMul .*, one row may choose or weigh"):
        build(load_model(tmp_path / "net"), CPU)
