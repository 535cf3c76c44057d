"""Two classes of the engine and the client never have the same name, so that a name says which one is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def classes(folder: Path) -> dict[str, list[str]]:
    """Where each class name is defined, nested classes included."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(folder)))
    return found


def test_no_two_classes_have_the_same_name() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for source in ("engine", "clients"):
        for name, places in classes(ROOT / source).items():
            found[name] += [f"{source}/{place}" for place in places]
    assert "StreamHandle" in found
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
