from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instep.config import Config
from instep.demo import MODEL_FOLDER
from instep.models.errors import ModelError
from instep.program import app
from instep.recording.errors import RecordingError
from instep.server.checks import CannotServe

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def instep(*arguments: str) -> Result:
    return RUNNER.invoke(app, list(arguments))


class Stub:
    """Stands in for a module's `run`: keeps what it was called with and answers as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer: int | BaseException = 0
        stub = ModuleType(module)
        stub.__dict__.update(run=self.run)
        monkeypatch.setitem(sys.modules, module, stub)

    def run(self, *args: Any, **kwargs: Any) -> int:
        self.calls.append((args, kwargs))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a folder `m` to serve."""
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        *("serve m", "verify a.instep", "model check m --json"),
    ],
)
def test_in_a_directory_that_was_deleted_each_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = instep(*command.split())
    sentence = "the working directory was deleted: change to one that exists"
    assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
    assert result.stdout == (json.dumps({"error": sentence}) + "\n" if "--json" in command else "")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr("instep.server.checks.before_loading", lambda *_, **__: [])  # another server may run here
    return Stub(monkeypatch, "instep.server.serve")


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch, "instep.replay.command")


class TestServe:
    def test_every_flag_sets_its_key(self, server: Stub, tmp_path: Path) -> None:
        result = instep(
            *("serve", str(tmp_path), "--endpoint", "tcp://127.0.0.1:1", "--device", "cpu", "--http", "127.0.0.1:0"),
            *("--record", str(tmp_path / "r"), "--set", "limits.max_connections=9", "--set", "verify.live=true"),
        )
        assert result.exit_code == 0, result.output
        (((config,), _),) = server.calls
        default = Config().model_dump()
        assert config.model_dump() == {
            **default,
            "model": {**default["model"], "folder": tmp_path.resolve()},
            "engine": {**default["engine"], "device": "cpu"},
            "transport": {**default["transport"], "endpoint": "tcp://127.0.0.1:1"},
            "http": {**default["http"], "endpoint": "127.0.0.1:0"},
            "limits": {**default["limits"], "max_connections": 9},
            "recording": {**default["recording"], "path": tmp_path.resolve() / "r"},
            "verify": {"live": True},
        }

    def test_reads_the_file_and_the_environment(
        self, server: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "c.yaml").write_text("model: {folder: m}\nengine: {max_batch_size: 2, device: cuda}\n")
        monkeypatch.setenv("INSTEP_ENGINE__MAX_BATCH_SIZE", "3")
        result = instep("serve", "--config", str(tmp_path / "c.yaml"), "--device", "cpu")
        assert result.exit_code == 0, result.output
        (((config,), _),) = server.calls
        assert (config.model.folder, config.engine.max_batch_size, config.engine.device) == (
            tmp_path.resolve() / "m",
            3,
            "cpu",
        )

    def test_says_which_variables_are_no_settings(self, server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INSTEP_MAX_STREAMS", "3")
        result = instep("serve", "m", "--set", "log.format=json")
        told, loading = map(json.loads, result.stderr.splitlines())
        assert (told["event"], told["level"], loading["event"]) == ("unknown setting", "warning", "loading")
        assert "INSTEP_ENGINE__MAX_STREAMS" in told["reason"]
        assert list(told)[:3] == ["timestamp", "level", "event"]

    def test_the_demos_model_is_served_only_when_asked_for(self, server: Stub) -> None:
        assert instep("serve", "--demo").exit_code == 0
        assert instep("serve").exit_code == 0
        ((demo,), _), ((none,), _) = server.calls
        assert demo.model.folder == MODEL_FOLDER
        assert none == Config()  # the server refuses it

    def test_says_why_it_cannot(self, server: Stub) -> None:
        server.answer = CannotServe("the endpoint is taken")
        result = instep("serve", "m")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines()[1:] == ["error: the endpoint is taken"]

    def test_reports_every_problem_a_line_each_and_serves_nothing(self, server: Stub) -> None:
        settings = [f"--set={each}" for each in ("limits.max_idel_s=3", "port=1", "log.level=loud")]
        result = instep("serve", "m", "--device", "gpu", *settings)
        assert result.exit_code == 2
        assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
            "engine.device (flag)",
            "limits.max_idel_s (flag)",
            "log.level (flag)",
            "port (flag)",
        ]
        assert result.stdout == ""
        assert server.calls == []

    def test_what_is_wrong_with_a_start_is_said_before_pytorch_is_loaded(self, tmp_path: Path) -> None:
        script = "import sys; sys.modules['torch'] = None; from instep.program import main; main()"
        elsewhere = ["--http", "127.0.0.1:0", "--set", f"http.token_file={tmp_path / 'token'}"]
        command = [sys.executable, "-c", script, "serve", "m", "--record", str(tmp_path / "no" / "x.instep")]
        free_port = ["--endpoint", "tcp://127.0.0.1:*", "--restart"]
        result = subprocess.run([*command, *elsewhere, *free_port], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (2, "")
        words = ("not a model folder", "there is no folder", str(tmp_path / "token"), "--restart needs a port")
        assert [each in line for each, line in zip(words, result.stderr.splitlines(), strict=True)] == [True] * 4


class TestErrors:
    @pytest.mark.parametrize(
        "error", [ModelError("the tensor [a] is missing"), RecordingError("the tensor [a] is missing")]
    )
    def test_of_users_are_one_sentence_and_status_2(self, server: Stub, error: Exception) -> None:
        server.answer = error
        result = instep("serve", "m")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines()[1:] == ["error: the tensor [a] is missing"]

    def test_ctrl_c_is_status_130(self, server: Stub) -> None:
        server.answer = KeyboardInterrupt()
        assert instep("serve", "m").exit_code == 130

    @pytest.mark.parametrize(("typo", "meant"), [("srve", "serve"), ("model chekc", "check")])
    def test_of_typing_are_answered_with_what_was_meant(self, typo: str, meant: str) -> None:
        result = instep(*typo.split())
        assert result.exit_code == 2
        assert f"Did you mean '{meant}'?" in result.stderr


class TestVerify:
    def test_hands_everything_on(self, verifier: Stub) -> None:
        verifier.answer = 1
        result = instep(
            "verify", "r.instep", "--folder", "m", *["--streams", "7", "--streams", "a"], "--json", "--report", "r.html"
        )
        assert result.exit_code == 1
        ((args, kwargs),) = verifier.calls
        assert args[:3] == ([Path("r.instep")], Path("m"), ["7", "a"])
        assert kwargs == {"json": True, "page": Path("r.html")}


class TestSettings:
    def test_shows_every_value_and_where_it_came_from(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "c.yaml"
        file.write_text("engine: {max_batch_size: 2}\n")
        monkeypatch.setenv("INSTEP_LOG__LEVEL", "debug")
        result = instep("doctor", "--settings", "--config", str(file), "--set", "log.format=json")
        assert result.exit_code == 0, result.output
        rows = {tuple(line.split(maxsplit=2)) for line in result.stdout.splitlines()}
        assert rows >= {
            ("engine.max_batch_size", "2", f"file {file}"),
            ("log.level", '"debug"', "INSTEP_LOG__LEVEL"),
            ("log.format", '"json"', "flag"),
            ("transport.endpoint", '"tcp://127.0.0.1:5757"', "default"),
            ("model.folder", "null", "default"),
        }
        assert len(rows) == sum(len(section) for section in Config().model_dump().values())

    def test_as_json(self) -> None:
        shown = json.loads(instep("doctor", "--settings", "--json", "--set", "recording.path=/r").stdout)
        assert shown["recording.path"] == {"value": "/r", "source": "flag"}
        assert shown["transport.allow_plaintext"] == {"value": False, "source": "default"}
        assert shown["limits.max_idle_s"] == {"value": 3600.0, "source": "default"}

    def test_that_is_wrong_is_an_object_with_json(self) -> None:
        result = instep("doctor", "--settings", "--json", "--set", "log.level=loud")
        sentence = instep("doctor", "--settings", "--set", "log.level=loud").stderr
        assert (result.exit_code, result.stderr) == (2, sentence)
        assert json.loads(result.stdout) == {"error": sentence.strip().removeprefix("error: ")}


def test_version() -> None:
    for arguments in (["--version"], ["-V"]):
        assert re.fullmatch(r"instep \d+\.\d+\.\d+\n", instep(*arguments).stdout)


def test_help_is_light() -> None:
    """What makes `--help` slow is what it imports: that is asserted, not the time."""
    heavy = ["torch", "numba", "yaml", "structlog", "matplotlib", "instep.config", "instep.models.model"]
    script = f"""
import sys
from instep.program import app
app(["--help"], standalone_mode=False)
print([name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_it_runs_as_a_module_and_as_a_program() -> None:
    program = Path(sys.executable).with_name("instep")
    for command in ([sys.executable, "-m", "instep"], [str(program)]):
        result = subprocess.run(
            [*command, "doctor", "--settings", "--set", "a.b=1"], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: a.b (flag): there is no such key; configs/default.yaml lists every key\n"


def test_a_stream_that_is_opened_needs_a_name() -> None:
    for options in (("--open", ""), ("--open", "x", "--output", "y")):
        result = instep("recordings", "state", "today.instep", "mic", "--seq", "3", *options)
        assert (result.exit_code, "--open" in result.stderr) == (2, True)
