"""Steps that torch.export.save wrote, as model folders beside their modules; and those that cannot be served."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.module.archived_step import import_pt2
from instep.models.network import PortableNetwork
from instep.models.stepping import step_frames
from tests.support.archives import CellWithHead, Odds, imported, save, zeros
from tests.support.steps import FEATURES, STEPS, Counting, example, leaves, repeated, step_of

ROWS: Final = 32


class TakenNames(nn.Module):
    """Names that the importer might use for something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.example, self.check_sizes, self._calls = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.own = nn.ModuleDict({"own": nn.Linear(FEATURES, 2)})
        self.register_buffer("_state", torch.ones(FEATURES))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.example(x) + self.check_sizes(h) * self._state)
        return self.own["own"](self._calls(h)), h


SERVED: Final[dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]] = {
    "gru_cell": (lambda: CellWithHead(nn.GRUCell), lambda: torch.zeros(1, 32)),
    "lstm_cell": (lambda: CellWithHead(nn.LSTMCell), lambda: {"h": torch.zeros(1, 32), "c": torch.zeros(1, 32)}),
    "taken_names": (TakenNames, lambda: torch.zeros(1, FEATURES)),
    "odds": (Odds, lambda: (torch.zeros(1, FEATURES), torch.zeros(1, dtype=torch.int64))),
    **{name: (lambda name=name: step_of(name), lambda name=name: zeros(example(name))) for name in STEPS},  # type: ignore[misc]
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SERVED)
def test_an_imported_step_computes_what_the_module_does(name: str) -> None:
    make, begin = SERVED[name]
    torch.manual_seed(3)
    module, state = make().eval(), repeated(begin(), 3)
    save(module, torch.randn(3, FEATURES), state)
    status, said = imported()
    assert status == 0, said
    assert "net: 5 features → step of " in said
    network, state = PortableNetwork(load_model("net")), repeated(state, ROWS)
    rows = network.state.initial(ROWS)
    with torch.inference_mode():
        for x in torch.randn(12, ROWS, FEATURES):
            graph, given = network.sequence(x[None].numpy(), rows), rows
            y, state = module(x, state)
            parts = list(y.values()) if isinstance(y, dict) else [y]
            truth = torch.cat([part.reshape(ROWS, -1) for part in parts], 1)
            found, rows = network.step(x.numpy(), given)
            np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
            for new, leaf in zip(network.state.unpack(rows).values(), leaves(state), strict=True):
                np.testing.assert_allclose(new, leaf, rtol=1e-5, atol=1e-5)
            assert graph is not None
            np.testing.assert_allclose(graph[0][0], truth, rtol=1e-5, atol=1e-5)


def test_an_imported_gru_cell_computes_what_nn_gru_does_over_the_sequence() -> None:
    torch.manual_seed(4)
    module = CellWithHead(nn.GRUCell).eval()
    gru = nn.GRU(FEATURES, 32)
    gru.load_state_dict({f"{name}_l0": tensor for name, tensor in module.cell.state_dict().items()})
    save(module, torch.randn(3, FEATURES), torch.zeros(3, 32))
    assert imported("--name", "ears", "--outputs", "a, b,c")[0] == 0
    model = load_model("net")
    assert (model.name, model.output_names) == ("ears", ("a", "b", "c"))
    network, x = PortableNetwork(model), torch.randn(50, ROWS, FEATURES)
    y, _ = step_frames(network, x.numpy(), network.state.initial(ROWS))
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(y), module.head(gru(x)[0]), rtol=0, atol=2e-6)


def test_names_of_leaves_and_outputs_and_options_of_other_kinds() -> None:
    save(Counting(), torch.randn(2, FEATURES), zeros(repeated(STEPS["counting"][1](), 2)))
    assert imported("--output", "own")[0] == 0
    assert [leaf.name for leaf in load_model("own").state.leaves] == ["count", "ring", "loud", "total"]
    assert "own holds a model already" in imported("--output", "own")[1]
    assert imported("--output", "own", "--overwrite")[0] == 0
    assert "go with weights, not with a graph" in imported("--after", "head:none")[1].replace("│ ", "")
    assert "go with an .onnx graph" in imported("--state", "h=hn")[1].replace("│ ", "")


def test_a_folder_that_holds_a_model_is_refused_before_the_file_is_looked_into() -> None:
    Path("own").mkdir()
    Path("own/model.yaml").touch()
    Path("net.pt2").write_text("nothing to export")
    assert "own holds a model already" in imported("--output", "own")[1]
    assert "holds a model" not in imported("--output", "own", "--overwrite")[1]


class Step(nn.Module):
    """A step whose forward a test gives."""

    def __init__(self, body: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.body = body
        self.norm = nn.BatchNorm1d(FEATURES)
        self.register_buffer("seen", torch.zeros(FEATURES))
        self.sixteen = nn.Parameter(torch.ones(FEATURES, dtype=torch.float16))

    def forward(self, x: Any, state: Any) -> Any:
        return self.body(self, x, state)


class OfThree(nn.Module):
    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        return x + h, h, c


def casts(self: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
    with torch.autocast("cpu"):
        y = functional.linear(x, torch.ones(3, FEATURES))
    return y.float(), h


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (lambda s, x, h: (s.norm(x), h), r"runs batch_norm as in training"),
        (lambda s, x, h: (x + s.seen.add_(1), h), "changes its own buffer seen in place; all streams would share it"),
        (lambda s, x, h: (x, h.mul_(0.5)), "changes leaf state of the state in place; return a new tensor"),
        (lambda s, x, h: (x + torch.randn_like(x), h), r"draws random numbers \(randn_like\)"),
        (lambda s, x, h: (functional.dropout(x, 0.5, True), h), "dropout"),
        (lambda s, x, h: (x[(x > 0).nonzero()[:, 0]].sum() + x, h), "lets values in a tensor decide how many elements"),
        (lambda s, x, h: (x + x[x > 0].sum(), h), "lets values in a tensor decide how many elements"),
        (lambda s, x, h: (x - x.mean(0), h), "the rows of a batch influence one another in the step"),
        (lambda s, x, h: (x.masked_scatter(x > 0, h), h), "calls aten.masked_scatter, which cannot be served"),
        (lambda s, x, h: (x + torch.empty_like(x), h), "whatever the memory holds"),
        (lambda s, x, h: (torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), h), "calls cond, .* use torch.where"),
        (casts, "calls wrap_with_autocast, which cannot be served"),
        (lambda s, x, h: (x + s.sixteen.float(), h), "sixteen of the step is float16, .* convert it"),
        (lambda s, x, h: (x, torch.cat([h, x], 1)), "must not grow"),
        (lambda s, x, h: (x, (h, h)), "the new state is one tuple"),
        (lambda s, x, h: x + h, r"must return \(y, new_state\), and it returns one Tensor"),
        (lambda s, x, h: ((x, None), h), "y is one NoneType"),
        (lambda s, x, h: (x.double(), h), "y is float64; return float32"),
    ],
)
def test_a_step_that_export_step_refuses_too_is_refused_in_its_words(
    body: Callable[[Any, Any, Any], Any], sentence: str
) -> None:
    save(Step(body).train(), torch.randn(3, FEATURES), torch.zeros(3, FEATURES), strict=False)
    status, said = imported()
    assert status == 2
    assert re.search(rf"^net.pt2: .*{sentence}", said), said
    assert not Path("net").exists()


def test_a_step_too_large_in_an_operator_alone_is_refused_with_its_line() -> None:
    def body(s: Any, x: Any, h: Any) -> Any:
        a, b = torch.ones(900, 1, 900), torch.ones(1, 900, 900)
        return x + functional.cosine_similarity(a, b, dim=2).sum(), h

    save(Step(body), torch.randn(3, FEATURES), torch.zeros(3, FEATURES))
    with pytest.raises(ModelError, match=r"the step \(.*, line \d+: .*\) takes more than 2,147,483,648 bytes"):
        import_pt2("net.pt2", "net")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of its own functions
def test_archives_that_are_no_step_of_a_batch() -> None:
    x, h = torch.randn(3, FEATURES), torch.zeros(3, FEATURES)
    plain = Step(lambda s, x, h: (x + h, h))
    nested = Step(lambda s, x, h: (x, h))
    rows, columns = torch.export.Dim("B"), torch.export.Dim("F")
    for step, args, kwargs, shapes, sentence in (
        (plain, (x, h), {}, None, "the step fixes the batch size (x was exported with 3 rows)"),
        (plain, (x[:1], h[:1]), {}, None, "(x was exported with 1 row): export it with more than one row"),
        (plain, (x,), {"state": h}, ({0: rows}, {0: rows}), "takes other arguments than (x, state); export it"),
        (OfThree(), (x, h, h), {}, ({0: rows},) * 3, "whole sequences as its module: instep.models.save_model(FOLDER"),
        (plain, (x, h), {}, ({0: rows, 1: columns},) * 2, "x has another dynamic size than the batch"),
        (plain, (x.double(), h), {}, ({0: rows},) * 2, "must be a float32 tensor of frames [rows, features]"),
        (plain, (x[:, :, None], h[:, :, None]), {}, ({0: rows},) * 2, "a float32 tensor of frames [rows, features]"),
        (nested, (x, {"a": [h]}), {}, ({0: rows}, {"a": [{0: rows}]}), "none inside another"),
        (nested, (x, (h, 3)), {}, ({0: rows}, ({0: rows}, None)), "takes arguments besides tensors"),
        (nested, (x, ()), {}, ({0: rows}, ()), "at least one"),
        (nested, (x, (h, torch.tensor(3))), {}, ({0: rows}, ({0: rows}, {})), "leaf 2 of the state is not a dense"),
        (nested, (x, h.bfloat16()), {}, ({0: rows}, {0: rows}), "is bfloat16; a state is made of"),
    ):
        torch.export.save(torch.export.export(step, args, kwargs, dynamic_shapes=shapes), "net.pt2")
        status, said = imported()
        assert status == 2
        assert sentence in said
    from torch.export.pt2_archive._package import package_pt2  # and torch._dynamo, which most test processes do without

    whole = torch.export.export(plain, (x, h), dynamic_shapes=({0: rows}, {0: rows}))
    package_pt2("net.pt2", exported_programs={"one": whole, "two": whole})
    assert "net.pt2: the archive holds 2 programs of torch.export; save one step alone" in imported()[1]
    for body, sentence in (
        (lambda s, x, h: (x + s.seen.add_(1), h), "changes its own seen in place; all streams would share it"),
        (lambda s, x, h: (x, h.add_(x)), "changes its frames or its state in place; return a new tensor"),
    ):
        decomposed = torch.export.export(Step(body), (x, h), dynamic_shapes=({0: rows}, {0: rows}))
        torch.export.save(decomposed.run_decompositions(), "net.pt2")
        assert sentence in imported()[1]


def test_a_path_that_is_too_long_for_a_file() -> None:
    with pytest.raises(ModelError, match=r"^cannot read the graph aaa.*: File name too long; put it there, or name"):
        import_pt2(f"{'a' * 300}.pt2", "net")
