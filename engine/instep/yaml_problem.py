"""What is wrong with a YAML text, for configurations and model folders alike."""

from __future__ import annotations

import re

import yaml


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """The end of a sentence, which names the line where PyYAML knows it."""
    if isinstance(error, yaml.MarkedYAMLError):
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or ""
        return f"{where}{error.context}, {problem}" if problem.startswith("but ") else f"{where}{problem}"
    return re.sub(r'in "<[a-z ]+>", ', "at ", " ".join(str(error).split()))
