"""One rule at a time, broken in the running process."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Change:
    """Texts of one function, and what stands there instead.

    Attributes:
        owner: the class or module that has the function.
        name: the function.
        swaps: texts that stand in it exactly once each, and what replaces them.
    """

    owner: Any
    name: str
    swaps: tuple[tuple[str, str], ...]


@contextmanager
def broken(change: Change) -> Iterator[None]:
    """Within, the function does what the change says.

    Raises:
        ValueError: when a text to change is not there exactly once, because the engine has changed.
    """
    function = getattr(change.owner, change.name)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in change.swaps:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} stands {source.count(old)} times in {change.name}; fit the mutant to the engine")
        source = source.replace(old, new)
    names: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source}", f"<{change.name}>", "exec")
    exec(code, vars(sys.modules[function.__module__]), names)
    with mock.patch.object(change.owner, change.name, names[change.name]):
        yield
