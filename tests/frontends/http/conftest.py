"""Pages of the dashboard in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.support.browsing import Pages

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

expect.set_options(timeout=20_000)  # as long as a busy machine may take


@pytest.fixture(scope="module")
def window() -> Iterator[Pages]:
    if CHROMIUM is None:
        pytest.skip("the dashboard is tested in Chromium, which is not installed: apt-get install chromium")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield Pages(chromium.new_context(reduced_motion="reduce"))
        chromium.close()


@pytest.fixture
def pages(window: Pages) -> Iterator[Pages]:
    yield window
    window.close()
