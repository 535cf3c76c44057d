"""Pages in a browser that must stay without errors, dialogues and sideways scrolling."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from playwright.sync_api import BrowserContext, Page

SHOTS = Path(__file__).parents[2] / "test-artefacts"


class Pages:
    """Opens pages in tabs of one window, because opening a window takes longer; at the end it forgets what they stored.

    Args:
        window: in which another tab stays open, for else it would close with the last page.
    """

    def __init__(self, window: BrowserContext) -> None:
        self._window = window
        self._pages: list[Page] = []
        self._complaints: list[str] = []
        self.expected: set[str] = {"ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED"}
        """What the browser may say in its console: first of all that a server was stopped."""

    def open(self, url: str, width: int = 1280, height: int = 800, scheme: Literal["light", "dark"] = "light") -> Page:
        """A page at this address, of this size."""
        page = self._window.new_page()
        self._pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("dialog", lambda dialog: self._complaints.append(dialog.message))
        page.on("console", lambda said: self._hear(said.type, said.text))
        page.goto(url)
        return page

    def close(self) -> None:
        """Check and close all pages."""
        for page in self._pages:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.evaluate("localStorage.clear()")
            page.close()
        self._window.clear_cookies()
        assert self._complaints == []

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(each in text for each in self.expected):
            self._complaints.append(text)


def keep(page: Page, name: str) -> None:
    """Leave a screenshot for people."""
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"dashboard-{name}.png", full_page=True)
