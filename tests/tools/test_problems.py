"""The names of files that are not complete yet."""

from __future__ import annotations

from pathlib import Path

from instep_tools.problems import is_part, part_of, parts_left


def test_the_parts_of_a_file_are_found_again_and_those_of_no_other(tmp_path: Path) -> None:
    whole, other = tmp_path / "a.rec", tmp_path / "a.rec.2"
    parts = {part_of(whole), part_of(whole)}
    for path in (*parts, part_of(other), whole, other):
        path.touch()
    assert set(parts_left(whole)) == parts
    assert all(map(is_part, parts))


def test_where_names_are_cut_parts_may_be_those_of_another_file(tmp_path: Path) -> None:
    alike = [tmp_path / ("a" * 50), tmp_path / ("a" * 60)]
    for path in alike:
        part_of(path).touch()
    assert [parts_left(path) for path in alike] == [[], []]
