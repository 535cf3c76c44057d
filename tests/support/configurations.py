"""Configurations that tests write, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.config import ConfigError, Problem, load_config


def problems(
    file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides, environ)
    return caught.value.problems


def written(folder: Path, text: str | Mapping[str, Any]) -> Path:
    file = folder / "instep.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return file
