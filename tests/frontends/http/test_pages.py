"""The files of the page: those of the package's folder and no others."""

from __future__ import annotations

import re

from instep.frontends.http.answers import STATIC
from tests.support.admin import administered, error


async def test_files_are_served_with_their_types_and_not_twice() -> None:
    async with administered() as (_, http):
        page = await http.get("/")
        assert (page.content, page.headers["content-type"]) == (
            (STATIC / "index.html").read_bytes(),
            "text/html; charset=utf-8",
        )
        assert (await http.get("/static/index.html")).content == page.content
        name = "vendor/uPlot.iife.min.js"
        script = await http.get(f"/static/{name}")
        assert script.content == (STATIC / name).read_bytes()
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["cache-control"] == "no-cache"
        again = await http.get(f"/static/{name}", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (STATIC.parent / "answers.py").is_file()
        for path in (
            "../answers.py",
            "%2e%2e/answers.py",
            "..%2fanswers.py",
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
