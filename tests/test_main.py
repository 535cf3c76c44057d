from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from instep import __main__, program

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def handler_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> object:
    def fail() -> None:
        raise error

    monkeypatch.setattr(program, "main", fail)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    return end.value.code


@pytest.mark.parametrize(("package", "extra"), [("typer", "cli"), ("torch", "engine"), ("pydantic", "engine")])
def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    assert ends(monkeypatch, ModuleNotFoundError(f"No module named '{package}.core'", name=f"{package}.core")) == 2
    said = capsys.readouterr().err
    assert package in said
    assert f'pip install "instep[{extra}]"' in said


def test_without_typer_even_the_help_says_so() -> None:
    script = "import sys; sys.modules['typer'] = None; sys.argv = ['instep', '--help']\n"
    script += "from instep.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert 'pip install "instep[cli]"' in result.stderr


@pytest.mark.parametrize(
    ("typed", "status"), [(["ping", "-e", "tcp://127.0.0.1:1"], 2), (["verify", "r.instep"], 2), (["--help"], 0)]
)
def test_a_client_command_runs_without_the_engines_packages(typed: list[str], status: int) -> None:
    lacking = ("torch", "numba", "llvmlite", "structlog", "starlette", "yaml")
    script = f"import sys; sys.modules |= dict.fromkeys({lacking}); sys.argv = ['instep', *{typed}]\n"
    script += "from instep.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert ("instep[engine]" in result.stderr) == (typed[0] == "verify")
    assert ("nothing listens" in result.stderr) == (typed[0] == "ping")


def test_an_interrupt_is_status_130_and_later_ones_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_program_begins_where_interrupts_are_handled_first() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == dict.fromkeys(("instep", "instep-client"), "instep.__main__:main")
    script = "import sys; before = set(sys.modules); import instep.__main__; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"typer", "asyncio", "typing", "numpy"}.isdisjoint(result.stdout.split())
