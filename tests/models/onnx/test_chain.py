"""GRU nodes in graphs over whole sequences become layers: truth is the torch module whose weights the graph holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, numpy_helper
from torch import nn
from typer.testing import CliRunner

from instep.cli import app
from instep.models.agreement import agreement
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.onnx.importer import import_onnx
from instep.models.registry import build
from tests.support.onnx_graphs import Arrays, Denoiser, denoiser, floats, graph, ints, node, recurrent_weights
from tests.support.running import CPU

torch.manual_seed(5)
NET = Denoiser()
WORDS = "7 features → dense 12 → GRU 12 × 2 layers → dense 16 relu → dense 7 sigmoid"


@pytest.mark.parametrize("batch", ["batch", 1])
def test_the_shape_of_nsnet2(tmp_path: Path, batch: int | str) -> None:
    path = tmp_path / "nsnet2.onnx"
    path.write_bytes(denoiser(NET, batch=batch).SerializeToString())
    result = CliRunner().invoke(app, ["model", "import", str(path), "--outputs", "a,b,c,d,e,f,g"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'nsnet2'}: {WORDS}\n"
    model = load_model(tmp_path / "nsnet2")
    assert model.output_names == tuple("abcdefg")
    torch.testing.assert_close(model.weights["gru.weight_hh_l1"], NET.gru.weight_hh_l1, rtol=0, atol=0)
    torch.testing.assert_close(model.weights["gru.bias_ih_l0"], NET.gru.bias_ih_l0, rtol=0, atol=0)
    x = torch.randn(3, 50, 7)
    with torch.inference_mode():
        found = agreement(build(model, CPU), x.numpy(), NET(x).numpy())
    assert found is not None
    assert found.agrees


def small(
    nodes: list[NodeProto],
    *,
    gru: nn.GRU | None = None,
    after: str = "g",
    width: int = 6,
    weights: Arrays | None = None,
) -> onnx.ModelProto:
    """x [T, 1, 4], nodes that give v, a GRU over v, nodes that take its outputs g [T, 1, 6]; `after` is answered."""
    gru = gru or nn.GRU(4, 6)
    last = next(at for at, each in enumerate(nodes) if "v" in each.output) + 1
    before, behind = nodes[:last], nodes[last:]
    return graph(
        [
            *before,
            node("GRU", ["v", "W", "R", "B"], ["Y", "Y_h"], name="rnn", hidden_size=6, linear_before_reset=1),
            node("Squeeze", ["Y", "one"], ["g"]),
            *behind,
        ],
        {"x": ["T", 1, 4]},
        {after: ["T", 1, width]},
        {"one": ints(1), **recurrent_weights(gru), **(weights or {})},
    )


SAME = node("Identity", ["x"], ["v"])


def test_layers_in_other_words(tmp_path: Path) -> None:
    """Gemm over rows, silu as x · σ(x), an activation without a layer, a GRU without biases, computed weights."""
    gru, dense = nn.GRU(4, 6, bias=False), nn.Linear(6, 3)
    nodes = [
        node("Elu", ["g"], ["e"]),
        node("Reshape", ["e", "flat"], ["rows"]),
        node("Transpose", ["A"], ["A_t"], perm=[1, 0]),
        node("Gemm", ["rows", "A_t", "b"], ["z"]),
        node("Sigmoid", ["z"], ["s"]),
        node("Mul", ["s", "z"], ["y"]),
    ]
    weights = {"A": dense.weight.detach().numpy(), "b": dense.bias.detach().numpy(), "flat": ints(-1, 6)}
    made = small([SAME, *nodes], gru=gru, after="y", width=3, weights=weights)
    made.graph.node[1].input[:] = ["v", "W", "R"]
    del made.graph.output[0].type.tensor_type.shape.dim[1]
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    model = import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    assert model.description.in_words() == "4 features → GRU 6 → dense 6 elu → dense 3 silu"
    x = torch.randn(40, 2, 4)
    with torch.inference_mode():
        y = nn.functional.silu(dense(nn.functional.elu(gru(x)[0])))
        found = agreement(build(model, CPU), x.numpy(), y.numpy())
    assert found is not None
    assert found.agrees


def test_only_the_last_frame_is_answered(tmp_path: Path) -> None:
    made = small([SAME, node("Squeeze", ["Y_h", "zero"], ["last"])], after="last", weights={"zero": ints(0)})
    del made.graph.output[0].type.tensor_type.shape.dim[0]
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    assert import_onnx(tmp_path / "net.onnx", tmp_path / "net").description.in_words() == "4 features → GRU 6"


def reversed_gates() -> onnx.ModelProto:
    """A GRU whose activations are named, and not torch's."""
    made = small([SAME])
    made.graph.node[1].attribute.append(onnx.helper.make_attribute("activations", ["HardSigmoid", "Tanh"]))
    return made


def starting_at(value: float) -> onnx.ModelProto:
    made = small([SAME], weights={"h0": np.full((1, 1, 6), value, np.float32)})
    made.graph.node[1].input.extend(["", "h0"])
    return made


def starting_late() -> onnx.ModelProto:
    """The initial state is computed from a shape, and is 1."""
    one = numpy_helper.from_array(floats(1), "one")
    make = node("ConstantOfShape", ["h_shape"], ["h0"], value=one)
    made = small([SAME], weights={"h_shape": ints(1, 1, 6)})
    made.graph.node.insert(0, node("Shape", ["x"], ["unused"]))
    made.graph.node.insert(0, make)
    made.graph.node[3].input.extend(["", "h0"])
    return made


def recurrent(module: nn.RNNBase, **attributes: Any) -> onnx.ModelProto:
    """x [T, 1, 4], one layer of the module and nothing else."""
    hidden, weights = module.hidden_size, recurrent_weights(module)
    name = type(module).__name__
    return graph(
        [node(name, ["x", *weights], ["Y"], hidden_size=hidden, **attributes), node("Squeeze", ["Y", "one"], ["y"])],
        {"x": ["T", 1, module.input_size]},
        {"y": ["T", 1, hidden]},
        {"one": ints(1), **weights},
    )


@pytest.mark.parametrize(
    ("module", "attributes", "words"),
    [
        (nn.LSTM(4, 6), {}, "LSTM 6"),
        (nn.LSTM(4, 6, bias=False), {"activations": ["Sigmoid", "Tanh", "Tanh"]}, "LSTM 6"),
        (nn.RNN(4, 6), {}, "RNN 6"),
        (nn.RNN(4, 6, nonlinearity="relu"), {"activations": ["Relu"]}, "RNN 6 relu"),
        (nn.GRU(4, 6), {"linear_before_reset": 1, "activations": ["Sigmoid", "Tanh"]}, "GRU 6"),
    ],
)
def test_each_kind_of_recurrent_node(
    tmp_path: Path, module: nn.RNNBase, attributes: dict[str, Any], words: str
) -> None:
    (tmp_path / "net.onnx").write_bytes(recurrent(module, **attributes).SerializeToString())
    model = import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    assert model.description.in_words() == f"4 features → {words}"
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(model.weights[f"{model.description.kind}.{name}"], tensor.detach(), rtol=0, atol=0)


def test_a_layer_norm(tmp_path: Path) -> None:
    norm = nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(norm.weight)
    nodes = [SAME, node("LayerNormalization", ["g", "w", "b"], ["n"], epsilon=1e-3), node("Relu", ["n"], ["y"])]
    weights = {"w": norm.weight.detach().numpy(), "b": norm.bias.detach().numpy()}
    gru = nn.GRU(4, 6)
    (tmp_path / "net.onnx").write_bytes(small(nodes, gru=gru, after="y", weights=weights).SerializeToString())
    model = import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    assert model.description.in_words() == "4 features → GRU 6 → layer norm relu"
    assert model.description.as_json()["after"][0]["eps"] == 1e-3
    x = torch.randn(40, 2, 4)
    with torch.inference_mode():
        found = agreement(build(model, CPU), x.numpy(), torch.relu(norm(gru(x)[0])).numpy())
    assert found is not None
    assert found.agrees


def mixed() -> onnx.ModelProto:
    second = {f"2.{name}": values for name, values in recurrent_weights(nn.RNN(6, 6)).items()}
    nodes = [node("RNN", ["g", *second], ["Y2", ""], hidden_size=6), node("Squeeze", ["Y2", "one"], ["y"])]
    return small([SAME, *nodes], after="y", weights=second)


def peepholes() -> onnx.ModelProto:
    made = recurrent(nn.LSTM(4, 6))
    made.graph.initializer.append(numpy_helper.from_array(np.ones((1, 18), np.float32), "P"))
    made.graph.node[0].input.extend(["", "", "", "P"])
    return made


def convolved() -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
        node("Conv", ["t", "k"], ["c"], name="conv"),
        node("Transpose", ["c"], ["v"], perm=[2, 0, 1]),
    ]
    return small(nodes, weights={"k": np.ones((4, 4, 1), np.float32)})


def two_sizes() -> onnx.ModelProto:
    second = {f"2.{name}": values for name, values in recurrent_weights(nn.GRU(6, 5)).items()}
    names = ["g", "2.W", "2.R", "2.B"]
    nodes = [
        node("GRU", names, ["Y2", ""], hidden_size=5, linear_before_reset=1),
        node("Squeeze", ["Y2", "one"], ["y"]),
    ]
    return small([SAME, *nodes], after="y", width=5, weights=second)


def apart() -> onnx.ModelProto:
    second = {f"2.{name}": values for name, values in recurrent_weights(nn.GRU(6, 6)).items()}
    nodes = [
        node("MatMul", ["g", "square"], ["m"], name="between"),
        node("GRU", ["m", "2.W", "2.R", "2.B"], ["Y2", ""], name="rnn2", hidden_size=6, linear_before_reset=1),
        node("Squeeze", ["Y2", "one"], ["y"]),
    ]
    return small([SAME, *nodes], after="y", weights=second | {"square": np.eye(6, dtype=np.float32)})


def swapped() -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["g"], ["u"], perm=[2, 1, 0]),
        node("Reshape", ["u", "to"], ["r"]),
        node("MatMul", ["r", "square"], ["y"]),
    ]
    return small([SAME, *nodes], after="y", weights={"to": ints(-1, 1, 6), "square": np.eye(6, k=1, dtype=np.float32)})


def several() -> onnx.ModelProto:
    made = small([SAME])
    made.graph.output.append(onnx.helper.make_tensor_value_info("Y_h", 1, [1, 1, 6]))
    return made


def besides() -> onnx.ModelProto:
    made = small([SAME])
    made.graph.input.append(onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, [1]))
    made.graph.node[1].input.append("lengths")
    return made


IN_THE_WAY: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "reset before the product": (
        lambda: denoiser(NET, linear_before_reset=0),
        "linear_before_reset must be 1, as in torch",
    ),
    "backward": (
        lambda: denoiser(NET, direction="reverse"),
        "it runs backward, from a frame that is not yet sent",
    ),
    "clipped": (lambda: denoiser(NET, clip=3.0), "it clips, which torch does not; train without"),
    "other activations": (reversed_gates, "its activations must be Sigmoid and Tanh"),
    "an initial state": (lambda: starting_at(0.5), "its initial state is not zero: export one step"),
    "a computed initial state": (starting_late, "its initial state is not zero: export one step"),
    "two sizes": (two_sizes, r"GRU \('Y2, '\) is in the way: its hidden size is 5, that of GRU \('rnn'\) is 6"),
    "a layer between GRUs": (apart, r"GRU \('rnn2'\) is in the way: it comes after MatMul \('between'\)"),
    "a residual connection": (
        lambda: small([SAME, node("Relu", ["g"], ["r"]), node("Add", ["g", "r"], ["y"], name="skip")], after="y"),
        r"Add \('skip'\) is in the way: it takes values from two places, 'g' and 'r'",
    ),
    "a convolution": (
        convolved,
        r"Conv \('conv'\) is in the way: a model folder holds one nn\.GRU, nn\.LSTM or nn\.RNN",
    ),
    "a mixture": (mixed, r"RNN \('Y2, '\) is in the way: it follows GRU \('rnn'\), and layers must be of one kind"),
    "peepholes": (peepholes, "it takes peepholes; export it without"),
    "another slope": (
        lambda: small([SAME, node("LeakyRelu", ["g"], ["y"], alpha=0.2)], after="y"),
        r"LeakyRelu \('y'\) is in the way: only alpha = 0\.01 is served, not 0\.2",
    ),
    "an activation first": (
        lambda: small([node("Tanh", ["x"], ["v"])]),
        r"Tanh \('v'\) is in the way: it comes before any",
    ),
    "a sum first": (
        lambda: small([node("Add", ["x", "one_more"], ["v"])], weights={"one_more": floats(1, 1, 1, 1)}),
        r"Add \('v'\) is in the way: it adds to something that is not a product with a matrix",
    ),
    "time and features swapped": (swapped, "the layers of .* do not give what the graph gives, they differ by"),
    "several outputs": (
        several,
        "has several outputs, g, Y_h: say which one is answered with --answer NAME",
    ),
    "an input besides": (besides, "has inputs that match no output, x, lengths: name the state with --state"),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_stands_in_the_way_is_named(tmp_path: Path, case: str) -> None:
    make, sentence = IN_THE_WAY[case]
    (tmp_path / "net.onnx").write_bytes(make().SerializeToString())
    with pytest.raises(ModelError, match=sentence):
        import_onnx(tmp_path / "net.onnx", tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_an_initial_state_of_zeros_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(starting_at(0).SerializeToString())
    assert import_onnx(tmp_path / "net.onnx", tmp_path / "net").description.in_words() == "4 features → GRU 6"
