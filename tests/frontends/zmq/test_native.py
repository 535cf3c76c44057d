"""libzmq as compiled code calls it."""

from __future__ import annotations

import ctypes
import importlib.util
from types import SimpleNamespace

import pytest

from instep.frontends import CannotListen
from instep.frontends.zmq import native


def test_without_a_shared_library_nothing_listens_and_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    spec = importlib.util.spec_from_file_location("native_without_library", native.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(CannotListen, match="pip install"):
        module.new_message()
