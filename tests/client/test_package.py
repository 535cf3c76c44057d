from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import instep_client
from instep_client.protocol import errors
from instep_client.protocol.codes import Code


def test_errors_have_one_tree_and_familiar_relatives() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.InstepError) for kind in kinds)
    assert {kind.__name__ for kind in kinds if kind.__module__ == errors.__name__} <= set(instep_client.__all__)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
    assert issubclass(errors.InvalidInput, ValueError)


def test_every_code_has_a_sentence() -> None:
    assert all(code.sentence for code in Code)


def test_it_imports_nothing_before_it_is_asked_to() -> None:
    """Else `instep` could not be interrupted quietly while numpy and ZeroMQ are imported."""
    script = """
import sys
import instep_client
print([name for name in ("numpy", "zmq", "msgpack", "asyncio") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_everything_it_names_is_there() -> None:
    assert dir(instep_client) == instep_client.__all__
    for name in instep_client.__all__:
        assert getattr(instep_client, name).__name__ == name
    assert instep_client.protocol.errors.InstepError is instep_client.InstepError
    with pytest.raises(AttributeError):
        getattr(instep_client, "Clinet")  # noqa: B009 (a type checker refuses the other way)


@pytest.mark.parametrize("name", ["Client", "Stream", "Group"])
def test_verbs_for_threads_take_what_those_for_asyncio_take(name: str) -> None:
    other = getattr(instep_client, f"Async{name}")
    verbs = {verb for verb, of in inspect.getmembers(other, inspect.isfunction) if not verb.startswith("_")}
    for verb in verbs - {"next_call"}:  # what iterating calls
        mine = inspect.signature(getattr(getattr(instep_client, name), verb))
        assert mine.parameters == inspect.signature(getattr(other, verb)).parameters, verb
