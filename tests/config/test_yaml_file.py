"""Files of configuration, and what in them is not one."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.config import Config, load_config
from tests.support.configurations import problems, written


class TestFiles:
    @pytest.mark.parametrize("text", ["", "# only a comment\n", "limits:\n", "---\n{}\n"])
    def test_that_say_nothing_mean_the_defaults(self, tmp_path: Path, text: str) -> None:
        assert load_config(written(tmp_path, text)) == Config()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- a\n- b\n", "it holds a list, not sections with keys"),
            ("limits\n", "it holds a str, not sections with keys"),
            ("limits: {max_idle_s: 1\n", "line 2"),
            ("limits:\n  max_idle_s: 1\n\tx: 2\n", "line 3"),
            ("log: !!python/object/apply:os.getcwd []\n", "python/object"),
            ("a: &x {b: 1}\nc: *x\n", "anchors and aliases"),
            ("limits: {<<: {max_idle_s: 1}}\n", "line 1"),
            ("5: {}\n", "the key 5 is not a word"),
            ("on: {}\n", "the key True is not a word"),
            ("limits: {max_idle_s: 2001-99-99}\n", "month"),
            ("---\n{}\n---\n{}\n", "line 3: expected a single document in the stream, but found another document"),
            ("\x00", "special characters are not allowed"),
            (f"limits: {'[' * 3000}{']' * 3000}\n", "nested too deeply"),
            ("limits: {max_idle_s: !!bool soon}\n", "does not fit its tag"),
            ("limits: {max_idle_s: !!timestamp soon}\n", "does not fit its tag"),
            ("limits: !!map [a]\n", "line 1: keys with values are expected"),
            ("recording: {file: ~nobody-by-this-name/r.instep}\n", "no home directory"),
        ],
    )
    def test_that_are_not_sections_of_keys_are_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (found,) = problems(written(tmp_path, text))
        assert found.source == f"file {tmp_path / 'instep.yaml'}"
        assert message in found.message

    def test_with_a_key_twice_are_refused_with_both_lines_of_each(self, tmp_path: Path) -> None:
        text = "limits:\n  max_idle_s: 1\n  max_idle_s: 2\nlog: {}\nlog: {}\n"
        found = problems(written(tmp_path, text))
        assert {each.message for each in found} == {
            "the key 'max_idle_s' stands twice, in lines 2 and 3",
            "the key 'log' stands twice, in lines 4 and 5",
        }

    def test_that_cannot_be_read(self, tmp_path: Path) -> None:
        (missing,) = problems(tmp_path / "no.yaml")
        assert "No such file" in missing.message
        (folder,) = problems(tmp_path)
        assert "cannot be read" in folder.message
        (tmp_path / "latin.yaml").write_bytes(b"log: \xe9\xff\n")
        (latin,) = problems(tmp_path / "latin.yaml")
        assert latin.message == "it is not a text file"

    def test_dates_are_not_numbers(self, tmp_path: Path) -> None:
        (found,) = problems(written(tmp_path, "limits: {max_idle_s: 2001-01-01}\n"))
        assert found.path == "limits.max_idle_s"
