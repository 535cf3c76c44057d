"""Networks of which only the weights are left: state dicts, and files that hold one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.handover.save import save_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.gru = nn.GRU(16, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.gru(self.encoder(x))[0])


NET = Net()
WORDS = "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"
LAYERS: dict[str, Any] = {"before": [("encoder.0", "relu")], "after": [("head", "none")]}

PREFIXES = ("_orig_mod", "module")
"""What torch.compile and nn.DataParallel put before every name."""


def test_a_state_dict_with_the_order_and_the_activations_is_the_module(tmp_path: Path) -> None:
    expected = save_model(tmp_path / "module", NET)
    weights = NET.state_dict()
    compiled, parallel = ({f"{prefix}.{name}": weights[name] for name in weights} for prefix in PREFIXES)
    for number, given in enumerate([weights, compiled, parallel]):
        found = save_model(tmp_path / f"{number}", given, **LAYERS)
        assert found.fingerprint == expected.fingerprint
        assert found.description.in_words() == WORDS


def test_arrays_of_numpy_are_weights_too(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in NET.state_dict().items()}
    expected = save_model(tmp_path / "module", NET).fingerprint
    found = save_model(tmp_path / "m", arrays, **LAYERS)
    assert found.fingerprint == expected
    for array in arrays.values():
        array[...] = 0
    assert found.fingerprint == load_model(tmp_path / "m").fingerprint == expected
    with pytest.raises(ModelError, match=r"after\.0\.weight .* float64"):
        save_model(tmp_path / "d", arrays | {"head.weight": np.zeros((7, 10))}, **LAYERS)


def test_order_and_activations_are_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        save_model(tmp_path / "m", NET.state_dict())
    call = (
        'save_model(path, weights, before=[("encoder.0", "ACTIVATION")], after=[("head", "ACTIVATION")]), or --before '
        "encoder.0:ACTIVATION --after head:ACTIVATION on the command line"
    )
    assert str(refused.value).endswith(call)
    with pytest.raises(ModelError, match=r"`encoder\.0` in before is 'ACTIVATION', .* one of none, "):
        save_model(tmp_path / "m", NET.state_dict(), [("encoder.0", "ACTIVATION")], [("head", "ACTIVATION")])
    assert not (tmp_path / "m").exists()


def test_nothing_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    tail = nn.ModuleDict({"0": nn.Conv1d(7, 7, 3), "1": nn.Linear(7, 7)})
    weights = {**nn.ModuleDict({"net": NET, "tail": tail}).state_dict(), "h0": torch.zeros(10)}
    given: dict[str, Any] = {"after": [("net.head", "none")]}

    def refused() -> str:
        with pytest.raises(ModelError) as error:
            save_model(tmp_path / "m", weights, **given)
        return str(error.value)

    assert refused().endswith('leave_out=["tail.0", "h0"], or --leave-out tail.0 --leave-out h0 on the command line')
    given["leave_out"] = ["tail.0", "h0"]
    assert "`net.encoder.0` (Linear 6→16), `tail.1` (Linear 7→7)" in refused()
    assert 'leave_out=["net.encoder.0", "tail.1"]' in refused()
    given["leave_out"] = ["tail", "h0", "net.encodr"]
    assert "no layer `net.encodr`; did you mean `net.encoder`?" in refused()
    given["leave_out"] = ["tail", "h0", "net.encoder"]
    found = save_model(tmp_path / "m", weights, **given)
    assert found.description.in_words() == "16 features → GRU 10 × 2 layers → dense 7"


def state_dict(**modules: nn.Module) -> dict[str, torch.Tensor]:
    return nn.ModuleDict(modules).state_dict()


def test_lstms_rnns_and_layer_norms_are_found_by_their_tensors(tmp_path: Path) -> None:
    net = state_dict(norm=nn.LayerNorm(3), lstm=nn.LSTM(3, 4, 2), out=nn.Linear(4, 5))
    layers: dict[str, Any] = {"before": [("norm", "tanh")], "after": [("out", "none")]}
    model = save_model(tmp_path / "lstm", net, **layers)
    assert model.description.in_words() == "3 features → layer norm tanh → LSTM 4 × 2 layers → dense 5"
    assert model.description.as_json()["before"][0]["eps"] == nn.LayerNorm(3).eps
    with pytest.raises(
        ModelError, match=r"`norm` \(LayerNorm 3\), `lstm` \(LSTM 3→4 × 2 layers\), `out` \(Linear 4→5\)"
    ):
        save_model(tmp_path / "unnamed", net)
    for nonlinearity in ("tanh", "relu"):
        rnn = nn.RNN(3, 4, nonlinearity=nonlinearity)
        found = save_model(tmp_path / nonlinearity, rnn.state_dict(), nonlinearity=nonlinearity)
        assert found.fingerprint == save_model(tmp_path / "same", rnn, overwrite=True).fingerprint


@pytest.mark.parametrize(
    ("weights", "layers", "named"),
    [
        (NET.state_dict(), {"after": [("haed", "none")]}, "no layer `haed`; did you mean `head`?"),
        (NET.state_dict(), {"after": [("gru", "none")]}, "`gru` of .* GRU 16→10"),
        (state_dict(a=nn.GRU(3, 4), b=nn.GRU(4, 4)), {}, r'\(a, b\); leave_out=\["b"\]'),
        (state_dict(a=nn.RNN(3, 4)), {}, 'nonlinearity="tanh"'),
        (state_dict(a=nn.Linear(3, 4)), {}, "no recurrent layers"),
        (state_dict(a=nn.GRU(3, 4, bidirectional=True)), {}, "a bidirectional GRU"),
        (state_dict(gru=nn.GRU(3, 4), norm=nn.RMSNorm(4)), {}, r"`norm` .*\(weight \[4\]\)"),
        ({"gru.weight_ih_l0": torch.zeros(12, 3), "step": 5}, {}, "`step`, a int"),
        (
            {name: tensor for name, tensor in state_dict(gru=nn.GRU(3, 4)).items() if "bias_hh" not in name},
            {},
            r"`gru` .*bias_hh_l0",
        ),
    ],
)
def test_weights_that_cannot_be_served_are_named(
    tmp_path: Path, weights: Any, layers: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        save_model(tmp_path / "m", weights, **layers)
    assert not (tmp_path / "m").exists()


def test_files_of_torch_and_safetensors_are_read(tmp_path: Path) -> None:
    weights = NET.state_dict()
    torch.save(weights, tmp_path / "net.pt")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    optimizer = torch.optim.Adam(NET.parameters()).state_dict()
    torch.save({"epoch": 3, "model": weights, "optimizer": optimizer}, tmp_path / "last.ckpt")
    save_file(weights, tmp_path / "net.safetensors")
    expected = save_model(tmp_path / "module", NET).fingerprint
    for name in ("net.pt", "old.pth", "last.ckpt", "net.safetensors"):
        assert save_model(tmp_path / f"of {name}", tmp_path / name, **LAYERS).fingerprint == expected
    assert save_model(tmp_path / "text", str(tmp_path / "net.pt"), **LAYERS).fingerprint == expected


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was executed"),))


def test_files_that_hold_no_weights_are_told_what_to_do_and_nothing_in_them_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(NET, "whole.pt")
    torch.save(Trap(), "trap.pt")
    torch.save({"ema": NET.state_dict(), "model": NET.state_dict()}, "two.pt")
    Path("text.pt").write_text("hello world")
    Path("empty.pt").touch()
    torch.save(NET.state_dict(), "whole_state.pt")
    content = Path("whole_state.pt").read_bytes()
    Path("cut.pt").write_bytes(content[: len(content) // 10])  # where torch itself says "Invalid argument"
    save_model("folder", NET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        torch.jit.trace(NET.eval(), torch.randn(2, 5, 6)).save("script.pt")  # type: ignore[no-untyped-call]
    no_weights = "is not a whole file of tensors alone"
    for name, named in {
        **dict.fromkeys(("whole.pt", "trap.pt", "text.pt", "empty.pt", "script.pt"), no_weights),
        "two.pt": "holds 2 state dicts",
        "cut.pt": "cut.pt",
        "folder/weights.safetensors": "folder is a model folder already",
        "nothing.pt": "cannot read nothing.pt",
        "x" * 300: "cannot read x+: File name too long",
    }.items():
        with pytest.raises(ModelError, match=named) as refused:
            save_model("m", name)
        assert name.partition("/")[0] in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not Path("was executed").exists()
    assert not Path("m").exists()
