"""The files of the page: those of the package's folder and no others."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from instep.frontends.http.pages import STATIC, Pages
from tests.support.admin import administered, error


async def test_files_are_served_with_their_types_and_not_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "static"
    (folder / "vendor").mkdir(parents=True)
    (folder / "index.html").write_text("<p>streams</p>")
    (folder / "vendor" / "a.js").write_text("let a;")
    (folder / ".hidden").write_text("x")
    (tmp_path / "secret").write_text("x")
    monkeypatch.setattr("instep.frontends.http.app.Pages", partial(Pages, folder))
    async with administered() as (_, http):
        page = await http.get("/")
        assert (page.text, page.headers["content-type"]) == ("<p>streams</p>", "text/html; charset=utf-8")
        assert (await http.get("/static/index.html")).text == page.text
        script = await http.get("/static/vendor/a.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["cache-control"] == "no-cache"
        again = await http.get("/static/vendor/a.js", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in (
            "../secret",
            "%2e%2e/secret",
            "..%2fsecret",
            ".hidden",
            "vendor",
            "vendor/",
            "//etc/passwd",
            "a.js",
        ):
            await error(http, f"/static/{path}", 404)


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    for path in STATIC.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://(?!www\.w3\.org)", text), path
        assert not re.search(r"<script(?![^>]*\ssrc=)", text), path
