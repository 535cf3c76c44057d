"""The page on the admin server agrees with the program: paths, the keys of every answer, parameters, errors, limits."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from instep.frontends.http import admin, events, security, streams
from instep.streaming.stats import EventKind
from instep.streaming.verification import Verification
from instep_client import AsyncClient
from tests.docs.support.page import Page
from tests.docs.support.shell import assert_exists, commands
from tests.support.admin import administered

PAGE = Page("http.md")
SOURCE = "".join(path.read_text() for path in Path(streams.__file__).parent.glob("*.py"))


def shape(value: Any) -> Any:
    """Which keys there are; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items() if key not in ("numbers", "columns")}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


async def test_every_example_has_the_keys_of_the_answer(tmp_path: Path) -> None:
    recording = {"file": tmp_path / "r.instep"}
    async with administered(recording=recording) as (server, http), AsyncClient(server.endpoint) as client:
        await (await client.open("mic-7")).step(np.zeros((2, 5)))
        while not (await http.get("/api/history")).json()["columns"]["time_s"]:
            await asyncio.sleep(0.1)
        for path, text in PAGE.blocks("json"):
            example = json.loads(text)
            if path.isdigit():
                assert example.keys() == {"error"}
                continue
            answer = (await http.get(path)).json()
            assert shape(answer) == shape(example), path
            assert answer.get("columns", {}).keys() >= example.get("columns", {}).keys()
            for model, shown in zip(answer.get("models", ()), example.get("models", ()), strict=True):
                assert model["numbers"].keys() >= shown["numbers"].keys()


def test_what_live_verification_says_is_explained() -> None:
    explained = PAGE.sections["Statistics"].partition("* `verification`")[2]
    assert Verification().as_json().keys() <= set(re.findall(r"`(\w+)`", explained))


def test_every_kind_of_event_is_listed() -> None:
    listed = PAGE.sections["Events"].partition("`kind` (")[2].partition(")")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == get_args(EventKind)


def test_every_path_is_listed() -> None:
    listed = {path for cell in PAGE.table("Paths", "path").column("path") for path in re.findall(r"/[a-z\d/]*", cell)}
    routed = {re.sub(r"\{.*", "", path) for path in re.findall(r'_route\("([^"]+)"', SOURCE)}
    assert listed == routed


def test_parameters_orders_and_states_are_those_of_the_code() -> None:
    table = PAGE.table("Streams", "parameter")
    meaning = dict(zip(table.column("parameter"), table.column("meaning"), strict=True))
    for parameter, values in (("sort", streams.SORTS), ("state", streams.STATES)):
        assert re.findall(r"[a-z]{3,}", meaning[parameter].partition(";")[0]) == list(values)
    assert [int(number) for number in re.findall(r"\d+", meaning["limit"])] == [1, streams.MOST, streams.USUAL]


def test_every_error_is_listed_with_its_status() -> None:
    raised = set(re.findall(r'HttpError\(\s*(\d+),\s*"(\w+)"', SOURCE))
    listed = {
        (status, code)
        for status, cell in PAGE.table("Errors", "status").rows
        for code in re.findall(r"[A-Z]+_[A-Z_]+|INTERNAL|UNAUTHORIZED", cell)
    }
    assert listed == raised


def test_its_limits_are_those_of_the_code() -> None:
    for number, unit in (
        (admin.MOST_CONNECTIONS, "connections"),
        (security.MOST_REQUESTS, "requests at a time"),
        (events.MOST_LISTENERS, "listeners"),
        (admin.MOST_HEAD_BYTES // 1024, "KiB"),
        (round(security.REQUESTS_PER_S), "a second"),
    ):
        assert re.search(rf"\b{number} {unit}", PAGE.text), unit


@pytest.mark.parametrize(
    "words",
    [words for _, block in PAGE.blocks("bash") for words in commands(block) if words[0] not in ("curl", "python")],
    ids=" ".join,
)
def test_the_commands_that_it_shows_exist(words: list[str]) -> None:
    assert_exists(words)
