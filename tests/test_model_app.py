"""The commands `instep model`, typed as users type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.text import Text
from torch import nn
from typer.testing import CliRunner, Result

from instep.models import save_model
from instep.program import app

RUNNER = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def instep(*arguments: str) -> Result:
    return RUNNER.invoke(app, list(arguments))


def made(folder: Path, features: int = 3) -> Path:
    save_model(folder, nn.GRU(features, 4, 2), [(nn.LayerNorm(features), "relu")], [(nn.Linear(4, 2), "none")])
    return folder


def test_check_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = made(tmp_path / "made"), "3 features → layer norm relu → GRU 4 × 2 layers → dense 2"
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    lines = instep("model", "check", str(folder)).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"made: {words}"
    monkeypatch.delenv("FORCE_COLOR")
    shown = instep("model", "check", str(folder)).stdout.splitlines()
    assert shown[0] == f"made: {words}"
    # layer norm 2·3; GRU 12·(3+4)+24, 12·(4+4)+24; dense 2·4+2
    assert shown[1].startswith("244 weights; fingerprint ")
    assert shown[2] == "portable-1: the same bits in every batch, on every processor with FMA"
    assert "  gru.weight_ih_l0 [12, 3]" in shown[3:]


def test_no_model_is_an_error_in_json(tmp_path: Path) -> None:
    found = instep("model", "check", str(tmp_path / "none"), "--json")
    assert (found.exit_code, json.loads(found.stdout)) == (2, {"error": found.stderr.strip().removeprefix("error: ")})
    assert f"there is no model folder {tmp_path / 'none'}" in found.stderr


def test_a_terminal_gets_an_error_in_lines_of_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = RUNNER.invoke(app, ["model", "check", "none"], env={"FORCE_COLOR": "1"})
    lines = Text.from_ansi(shown.stderr).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines) == instep("model", "check", "none").stderr.strip()


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

gru = net.rnn
torch.save(net.state_dict(), "net.pt")
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was imported from the weights of the network in `net.py`."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    exec(NET, {})
    made = instep("model", "import", "net.pt", "--after", "head:Softmax")
    assert (made.exit_code, made.stdout) == (0, "net: 5 features → GRU 40 → dense 3 softmax\n"), made.output
    return tmp_path / "net"


def test_a_model_that_is_there_is_replaced_only_when_asked_to(imported: Path) -> None:
    again = instep("model", "import", "net.pt", "--after", "head:relu")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "--overwrite" in again.stderr
    assert "softmax" in instep("model", "check", "net").stdout
    other = ("--output", "net", "--leave-out", "head", "--overwrite")
    assert instep("model", "import", "net.pt", *other).stdout == "net: 5 features → GRU 40\n"
    assert instep("model", "check", "net").stdout.startswith("net: 5 features → GRU 40\n")


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


@pytest.mark.parametrize("name", ["again", "frames_first", "last"])
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
        ("net.py", "as in net.py:net"),
        ("net.py:nett", "'nett'"),
        ("net.py:broken", "net.py, line 30: AttributeError"),
        ("net.py:net.head", "net.py:net.head fails on frames [32, 64, 5]"),
        ("net.py:gru", "net.py:gru gives the shape [32, 64, 40]"),
    ],
)
def test_what_cannot_be_compared_is_status_2(imported: Path, against: str, named: str) -> None:
    found = instep("model", "check", "net", "--against", against)
    assert (found.exit_code, found.stdout) == (2, "")
    assert named in found.stderr
