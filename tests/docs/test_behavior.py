"""Every promise names the tests that hold it. (That they exist is tested with all other files that pages name.)"""

from __future__ import annotations

import re

import pytest

from tests.docs.support.page import Page

PROMISES = [
    promise
    for heading, text in Page("behavior.md").sections.items()
    if heading != "What is not there"
    for promise in re.split(r"^\* ", text, flags=re.MULTILINE)[1:]
]


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_names_a_test(promise: str) -> None:
    assert re.search(r"`tests/[\w/]+(\.py)?`", promise)
