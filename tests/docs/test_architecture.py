"""What the architecture names is in the code: files, the functions of a frame's road, and the seams."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.docs.support.page import Page

ENGINE = Path(__file__).parents[2] / "engine" / "instep"
PAGE = Page("architecture.md")
HOPS = PAGE.table("A frame's life", "hop")
FOLDERS = PAGE.table("Folders, and the direction of imports", "folder of `engine/instep/")
SEAMS = PAGE.table("Seams", "seam")


def defined_in(file: str) -> set[str]:
    """Classes, functions, and `Class.method` of a file of the engine, and the names that it imports."""
    names: set[str] = set()
    for node in ast.parse((ENGINE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = (each.name for each in node.body if isinstance(each, ast.FunctionDef))
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname is not None}
    return names


@pytest.mark.parametrize(("function", "file"), list(zip(HOPS.column("function"), HOPS.column("file"), strict=True)))
def test_each_hop_of_a_frame_is_in_its_file(function: str, file: str) -> None:
    assert function in defined_in(file)


def test_a_frame_makes_at_most_twelve_hops_through_at_most_twelve_files() -> None:
    hops = HOPS.numbers("hop")
    assert hops == list(range(1, len(hops) + 1))
    assert len(hops) <= 12
    assert len(set(HOPS.column("file"))) <= 12


@pytest.mark.parametrize(("seam", "file"), list(zip(SEAMS.column("seam"), SEAMS.column("file"), strict=True)))
def test_each_seam_is_in_its_file(seam: str, file: str) -> None:
    assert seam in defined_in(file)


def test_every_folder_of_the_engine_is_described() -> None:
    described = " ".join(row[0] for row in FOLDERS.rows)
    folders = {path.parent.name for path in ENGINE.glob("*/__init__.py")}
    assert {folder for folder in folders if f"{folder}/" not in described} == set()
