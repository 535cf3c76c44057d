"""The commands `instep model`, typed as users type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.text import Text
from typer.testing import CliRunner, Result

from instep.cli import app

RUNNER = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def instep(*arguments: str) -> Result:
    return RUNNER.invoke(app, list(arguments))


def test_make_and_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    made = instep(
        *("model", "make", str(folder), "--features", "3", "--hidden", "4", "--layers", "2"),
        *("--before", "8:relu", "--before", "5:tanh", "--before", "layer_norm", "--after", "2"),
    )
    assert made.exit_code == 0, made.output
    words = "3 features → dense 8 relu → dense 5 tanh → layer norm → GRU 4 × 2 layers → dense 2"
    assert made.stdout == f"{folder}: {words}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    lines = instep("model", "info", str(folder)).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines[:2]).split() == f"made: {words}".split()
    monkeypatch.delenv("FORCE_COLOR")
    shown = instep("model", "info", str(folder)).stdout.splitlines()
    assert shown[0] == f"made: {words}"
    # dense 8·3+8, 5·8+5; layer norm 2·5; GRU 12·(5+4)+24, 12·(4+4)+24; dense 2·4+2
    assert shown[1].startswith("349 weights; fingerprint ")
    assert "  gru.weight_ih_l0 [12, 5]" in shown[2:]


def test_other_kinds_are_made_and_said_how_they_step(tmp_path: Path) -> None:
    sizes = ("--features", "3", "--hidden", "32", "--layers", "2")
    norms = ("--before", "layer_norm", "--before", "8", "--before", "layer_norm:relu")
    for kind, options, words in (
        ("lstm", norms, "layer norm → dense 8 → layer norm relu → LSTM 32 × 2 layers"),
        ("rnn", ("--nonlinearity", "relu"), "RNN 32 × 2 layers relu"),
    ):
        made = instep("model", "make", str(tmp_path / kind), *sizes, "--kind", kind, *options)
        assert (made.exit_code, made.stdout) == (0, f"{tmp_path / kind}: 3 features → {words}\n"), made.output
        shown = json.loads(instep("model", "info", str(tmp_path / kind), "--json").stdout)
        assert shown["arithmetic"] == "portable-1"
        lines = instep("model", "info", str(tmp_path / kind)).stdout.splitlines()
        assert "portable-1: the same bits in every batch, on every processor with FMA" in lines
    wrong = instep("model", "make", str(tmp_path / "x"), *sizes, "--nonlinearity", "relu")
    assert wrong.exit_code == 2
    assert "--nonlinearity: there is no such key" in wrong.stderr
    overlong = instep("model", "make", str(tmp_path / ("x" * 101)), *sizes)
    assert overlong.exit_code == 2
    assert "a model's name must be 1 to 100 printable characters, not 'xxx" in overlong.stderr
    assert "; give another, with name= in Python or --name on the command line" in overlong.stderr


def test_constant_weights_without_biases(tmp_path: Path) -> None:
    from instep.models.folder import load_model

    arguments = ["--features", "3", "--hidden", "4", "--no-bias", "--after", "2", "--name", "the seed's"]
    result = instep("model", "make", str(tmp_path), *arguments, "--init", "constant", "--weight", "0.25")
    assert result.exit_code == 0, result.output
    model = load_model(tmp_path)
    assert model.name == "the seed's"
    assert set(model.weights) == {"gru.weight_ih_l0", "gru.weight_hh_l0", "after.0.weight"}
    assert all(bool((tensor == 0.25).all()) for tensor in model.weights.values())


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    fingerprints = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        instep("model", "make", str(tmp_path / name), "--features", "3", "--hidden", "4", "--seed", seed)
        fingerprints.append(json.loads(instep("model", "info", str(tmp_path / name), "--json").stdout)["fingerprint"])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_info_of_no_model_is_an_error_in_json(tmp_path: Path) -> None:
    found = instep("model", "info", str(tmp_path / "none"), "--json")
    assert (found.exit_code, json.loads(found.stdout)) == (2, {"error": found.stderr.strip()})
    assert f"there is no model folder {tmp_path / 'none'}" in found.stderr


def test_a_terminal_gets_an_error_in_lines_of_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = RUNNER.invoke(app, ["model", "info", "none"], env={"FORCE_COLOR": "1"})
    lines = Text.from_ansi(shown.stderr).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines) == instep("model", "info", "none").stderr.strip()


def test_info_as_json(tmp_path: Path) -> None:
    instep("model", "make", str(tmp_path), "--features", "3", "--hidden", "4", "--bias", "1", "--init", "constant")
    shown = json.loads(instep("model", "info", str(tmp_path), "--json").stdout)
    assert shown["tensors"] == {
        "gru.weight_ih_l0": [12, 3],
        "gru.weight_hh_l0": [12, 4],
        "gru.bias_ih_l0": [12],
        "gru.bias_hh_l0": [12],
    }
    assert shown["weights"] == 36 + 48 + 12 + 12
    assert shown["description"]["gru"]["hidden_size"] == 4


def test_a_model_that_is_there_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    make = ("model", "make", str(tmp_path / "m"), "--hidden", "4")
    assert instep(*make, "--features", "3").exit_code == 0
    again = instep(*make, "--features", "5")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "holds a model already" in again.stderr
    assert "--overwrite" in again.stderr
    assert "3 features" in instep("model", "info", str(tmp_path / "m")).stdout
    assert instep(*make, "--features", "5", "--overwrite").exit_code == 0
    assert "5 features" in instep("model", "info", str(tmp_path / "m")).stdout


def test_what_cannot_be_made(tmp_path: Path) -> None:
    result = instep("model", "make", str(tmp_path / "m"), "--features", "0", "--hidden", "4", "--after", "x:rely")
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["--features", "--after x", "--after x"]
    assert "'rely' is wrong" in lines[2]
    others = instep("model", "make", str(tmp_path / "m"), "--features", "1", "--hidden", "0", "--layers", "-1")
    assert [line.split(":")[0] for line in others.stderr.splitlines()] == ["--hidden", "--layers"]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("hidden", [99_999_999, 10**30])
def test_a_size_that_no_memory_holds_is_told_in_a_sentence(tmp_path: Path, hidden: int) -> None:
    result = instep("model", "make", str(tmp_path / "m"), "--features", "12", "--hidden", str(hidden))
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    count = 3 * hidden * (12 + hidden) + 6 * hidden
    assert result.stderr.startswith(f"no memory for a model of {count:,} weights (")
    assert not (tmp_path / "m").exists()


def test_all_weights_together_have_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("model", "make", str(tmp_path / "m"), "--features", "2", "--hidden", "2", "--layers", "3")
    count = 3 * (3 * 2 * (2 + 2) + 6 * 2)
    monkeypatch.setattr("instep.models.folder.usable_memory", lambda: 4 * count - 1)
    result = instep(*arguments)
    assert (result.exit_code, result.stderr.split(" weights")[0]) == (2, f"no memory for a model of {count}")
    monkeypatch.setattr("instep.models.folder.usable_memory", lambda: 4 * count)
    assert instep(*arguments).exit_code == 0


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    result = instep("model", "info", str(tmp_path))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 40, batch_first=True)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return torch.softmax(self.head(self.rnn(x)[0]), -1)

torch.manual_seed(3)
net = Net()
frames_first = nn.Sequential(nn.Identity())
frames_first.forward = lambda x: net(x.transpose(0, 1)).transpose(0, 1)
last = nn.Sequential(nn.Identity())
last.forward = lambda x: net(x)[:, -1]

def again():
    made = Net()
    made.load_state_dict(net.state_dict())
    return made

def untrained():
    return Net()

def broken():
    return net.nothing

def without_frames():
    return 5

gru = net.rnn
torch.save(net.state_dict(), "net.pt")
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was imported from the weights of the network in `net.py`."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    exec(NET, {})
    made = instep("model", "import", "net.pt", "--after", "head:Softmax", "--outputs", "low,mid,high")
    assert (made.exit_code, made.stdout) == (0, "net: 5 features → GRU 40 → dense 3 softmax\n"), made.output
    return tmp_path / "net"


def test_weights_are_imported_and_their_outputs_named(imported: Path) -> None:
    assert "outputs: low, mid, high" in instep("model", "info", str(imported)).stdout.splitlines()
    assert json.loads(instep("model", "info", "net", "--json").stdout)["output_names"] == ["low", "mid", "high"]
    again = instep("model", "import", "net.pt", "--after", "head:relu")
    assert again.exit_code == 2
    assert "holds a model already" in again.stderr
    other = ("--output", "other", "--leave-out", "head", "--name", "ears", "--overwrite")
    assert instep("model", "import", "net.pt", *other).stdout == "other: 5 features → GRU 40\n"
    assert instep("model", "info", "other").stdout.startswith("ears: 5 features → GRU 40\n")


def test_an_import_says_what_the_file_holds_and_which_option_is_wrong(imported: Path) -> None:
    unnamed = instep("model", "import", "net.pt", "--output", "m")
    assert (unnamed.exit_code, unnamed.stdout) == (2, "")
    assert "net.pt has `rnn` (GRU 5→40), `head` (Linear 40→3); weights do not say" in unnamed.stderr
    assert "or --after head:ACTIVATION on the command line" in unnamed.stderr
    without = instep("model", "import", "net.pt", "--output", "m", "--after", "head")
    assert without.exit_code == 2
    assert "'head' should look like head:relu, or head:none" in without.stderr
    assert "No such file or directory" in instep("model", "import", "nothing.pt").stderr
    assert not Path("m").exists()


@pytest.mark.parametrize("name", ["net", "again", "frames_first", "last"])
def test_a_folder_agrees_with_the_module_that_it_was_made_from(imported: Path, name: str) -> None:
    found = instep("model", "check", "net", "--against", f"net.py:{name}")
    assert found.exit_code == 0, found.output
    assert all(len(line) <= 80 for line in found.stdout.splitlines())
    assert "They agree" in found.stdout
    shown = json.loads(instep("model", "check", "net", "--against", f"net.py:{name}", "--json").stdout)
    assert (shown["agrees"], shown["frames"]) == (True, [32, 64, 5])
    assert 0 <= shown["error"] < 1e-6 < shown["tolerance"] < 1e-4


def test_a_folder_that_holds_something_else_is_status_1(imported: Path) -> None:
    other = instep("model", "check", "net", "--against", "net.py:untrained")
    assert other.exit_code == 1
    assert "They differ" in other.stdout
    instep("model", "import", "net.pt", "--output", "relu", "--after", "head:relu")
    shown = instep("model", "check", "relu", "--against", "net.py:net", "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["error"] > 0.1


@pytest.mark.parametrize(
    ("against", "named"),
    [
        ("x" * 300 + ":net", "there is no file xxx"),
        ("net.py", "as in net.py:net"),
        ("net.pt:net", "net.pt is not a Python file"),
        ("net.py:nett", "did you mean net.py:net?"),
        ("net.py:broken", "net.py, line 30: AttributeError"),
        ("net.py:Net", "net.py:Net is a class"),
        ("net.py:without_frames", "net.py:without_frames is 5"),
        ("net.py:net.head", "net.py:net.head fails on random frames [32, 64, 5]"),
        ("net.py:gru", "net.py:gru gives the shape [32, 64, 40]"),
        ("bad.py:net", "bad.py, line 1: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_compared_is_status_2(imported: Path, against: str, named: str) -> None:
    Path("bad.py").write_text("1 / 0\n")
    found = instep("model", "check", "net", "--against", against)
    assert (found.exit_code, found.stdout) == (2, "")
    assert named in found.stderr
