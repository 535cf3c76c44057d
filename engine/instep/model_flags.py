"""A network's description from the flags of `instep model make`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from instep.config import ConfigError, Problem
from instep.models.gru.description import GruDescription


def described(
    features: int, gru: Mapping[str, Any], dense: Mapping[str, Sequence[str]], *, bias: bool
) -> GruDescription:
    """The description, checked.

    Args:
        features: values a frame.
        gru: the keys of `GruLayers`.
        dense: what was typed for each dense layer, `64:relu` or `64`, by `before` and `after`.
        bias: whether the dense layers have biases.

    Raises:
        ConfigError: naming each flag that is wrong, those of dense layers as they were typed.
    """
    layers = {place: [_dense(text, bias) for text in texts] for place, texts in dense.items()}
    try:
        return GruDescription.model_validate({"features": features, "gru": gru, **layers})
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    "",
                    _flag(found["loc"], dense),
                    found["msg"].replace("Input should", f"{found['input']!r} is wrong, it should"),
                    "see `instep model make --help`",
                )
                for found in error.errors(include_url=False)
            ]
        ) from None


def _dense(text: str, bias: bool) -> dict[str, Any]:
    size, _, activation = text.partition(":")
    return {"size": int(size) if size.isdecimal() else size, "activation": activation or "none", "bias": bias}


def _flag(location: tuple[int | str, ...], dense: Mapping[str, Sequence[str]]) -> str:
    """Which flag gave that part of a description: `--after 3:softmx`."""
    match location:
        case (("before" | "after") as place, int(index), *_):
            return f"--{place} {dense[place][index]}"
        case ("gru", "hidden_size"):
            return "--hidden"
        case ("gru", "num_layers"):
            return "--layers"
        case _:
            return f"--{location[0]}"
