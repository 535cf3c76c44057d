"""What was typed and cannot be meant, said in the same plain words whatever the libraries below say of it."""

from __future__ import annotations

from typing import Any, Final

import typer
from typer.core import TyperGroup

from instep_client.endpoint import checked_endpoint
from instep_client.protocol.errors import InvalidInput

_PLAIN: Final = {
    "int_parsing": "{value!r} is not a whole number",
    "int_from_float": "{value!r} is not a whole number",
    "float_parsing": "{value!r} is not a number",
    "greater_than_equal": "it must be at least {ge}, not {value}",
    "less_than_equal": "it must be at most {le}, not {value}",
}
"""By pydantic's kinds of errors, with which newer versions of typer check."""


class PlainCommands(TyperGroup):
    """Commands that say in plain words which value of an option cannot be."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = in_plain_words(error)
            raise


def in_plain_words(error: typer.BadParameter) -> str:
    """The message, without the words of the library that found it."""
    errors = getattr(error.__cause__, "errors", None)
    if errors is not None:
        (found, *_) = errors()
        sentence = _PLAIN.get(found["type"])
        if sentence is not None:
            return sentence.format(value=found["input"], **found.get("ctx", {}))
    return error.message.removeprefix("Value error, ")


def endpoint(text: str) -> str:
    """The text, when a client may connect to it.

    Raises:
        typer.BadParameter: saying what to write instead.
    """
    try:
        return checked_endpoint(text)
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None
