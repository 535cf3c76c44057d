"""The configurations in `configs/`: the manual of all keys, and those of the models that are shipped."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from instep.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


class TestTheManual:
    text = (CONFIGS / "default.yaml").read_text(encoding="utf-8")

    def test_lists_every_key_with_the_default_of_the_code_and_nothing_else(self) -> None:
        manual = yaml.safe_load(self.text)
        code = Config().model_dump(mode="json")
        assert manual == code
        assert [(name, list(keys)) for name, keys in manual.items()] == [
            (name, list(keys)) for name, keys in code.items()
        ]
        for name, keys in code.items():  # 1 and 1.0 and true are equal to ==
            assert {key: type(value) for key, value in manual[name].items()} == {
                key: type(value) for key, value in keys.items()
            }

    def test_explains_every_key_in_the_lines_above_it(self) -> None:
        lines = self.text.splitlines()
        keys = [number for number, line in enumerate(lines) if re.match(r"  \w+:", line)]
        assert len(keys) == sum(len(section) for section in Config().model_dump().values())
        for number in keys:
            assert lines[number - 1].startswith("  # "), lines[number]

    def test_names_the_unit_where_the_key_has_one(self) -> None:
        lines = self.text.splitlines()
        units = {"_us": "Microseconds", "_s": "Seconds", "_bytes": "Bytes"}
        found = 0
        for number, line in enumerate(lines):
            match = re.match(r"  \w+?(_us|_s|_bytes):", line)
            if match:
                above = lines[:number]
                while above[-1].startswith("  #"):
                    comment = above.pop()
                assert comment.startswith(f"  # {units[match[1]]}"), line
                found += 1
        assert found == 15

    def test_loads_as_the_defaults(self) -> None:
        assert load_config(CONFIGS / "default.yaml") == Config() == load_config()


class TestShippedConfigs:
    def test_name_a_folder_that_is_there(self) -> None:
        model = load_config(CONFIGS / "demo.yaml").model
        assert model.folder == CONFIGS.parent / "engine/instep/demo/model"
        assert (model.folder / "model.yaml").is_file()
