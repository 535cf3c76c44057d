"""Pages in a browser that must stay without errors, dialogues and sideways scrolling."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from playwright.sync_api import BrowserContext, Error, Page

SHOTS = Path(__file__).parents[2] / "test-artefacts"


class Pages:
    """Shows pages in the tabs of one window.

    Tabs that one test has used are used by the next, because to open a tab, let alone a window, takes longer than to
    load a page. Nothing that a page has stored is left to the next test.
    """

    def __init__(self, window: BrowserContext) -> None:
        self._window = window
        self._idle: list[Page] = []
        self._shown: list[Page] = []
        self._begin()

    def _begin(self) -> None:
        self._complaints: list[str] = []
        self.expected: set[str] = {"ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED"}
        """What the browser may say in its console: first of all that a server was stopped."""

    def open(self, url: str, width: int = 1280, height: int = 800, scheme: Literal["light", "dark"] = "light") -> Page:
        """A page at this address, of this size."""
        page = self._idle.pop() if self._idle else self._new_tab()
        self._shown.append(page)
        page.bring_to_front()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.goto(url)
        return page

    def close(self) -> None:
        """Check and leave all pages."""
        shown, self._shown, too_wide = self._shown, [], []
        for page in shown:
            try:
                if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                    too_wide.append(page.url)
                page.evaluate("localStorage.clear(); sessionStorage.clear()")
                page.goto("about:blank")
                page.unroute_all()  # only now: until it is left, a page asks for what a route answers
            except Error:  # it shows an error, or is closed
                page.close()
            else:
                self._idle.append(page)
        self._window.clear_cookies()
        complaints = self._complaints
        self._begin()
        assert not too_wide, f"scrolls sideways: {too_wide}"
        assert not complaints, complaints

    def _new_tab(self) -> Page:
        page = self._window.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("dialog", lambda dialog: self._complaints.append(dialog.message))
        page.on("console", lambda said: self._hear(said.type, said.text))
        return page

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(each in text for each in self.expected):
            self._complaints.append(text)


def keep(page: Page, name: str) -> None:
    """Leave a screenshot for people."""
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"dashboard-{name}.png", full_page=True)
