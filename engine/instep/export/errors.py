"""Why a recording could not be exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CannotExport(Exception):
    """One sentence: what stands in the way, and what to do."""


@contextmanager
def optional_libraries(format: str) -> Iterator[None]:
    """Import inside what only this format needs.

    Raises:
        CannotExport: when it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise CannotExport(
            f"{format} needs a library that is missing here ({error.name or error}): "
            'pip install "instep[export]", or pip install -e ".[export]" in a checkout; or export to csv or npz'
        ) from error
