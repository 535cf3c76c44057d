from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep.demo.picture import draw, examples, settled_after
from instep.demo.producers import Heard

NEVER = np.inf


def test_settled_after() -> None:
    right = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], np.bool_)
    assert settled_after(right).tolist() == [1, 2, 3, NEVER, NEVER]


@pytest.mark.parametrize(
    ("settled", "lengths", "speakers", "rows"),
    [
        # At once: the longest (1). Later: 2, 3, 9, of which 3 is in the middle. Last: 9. Never.
        ([1, 1, 3, NEVER, 9, 2], [7, 9, 8, 8, 8, 8], [0, 1, 2, 3, 4, 5], [1, 2, 4, 3]),
        # Of those alike, a speaker not shown yet before a longer one.
        ([1, 2, 2, 5, NEVER, NEVER], [9, 9, 8, 8, 9, 8], [0, 0, 1, 2, 1, 3], [0, 2, 3, 5]),
        # Nothing but certain decisions, or wrong ones: others of the same.
        ([1, 1, 1, 1], [6, 7, 8, 9], [0, 1, 2, 3], [3, 2, 1, 0]),
        ([NEVER] * 4, [9, 8, 7, 6], [0, 0, 0, 0], [0, 1, 2, 3]),
    ],
)
def test_examples_go_from_certain_to_wrong(
    settled: list[float], lengths: list[int], speakers: list[int], rows: list[int]
) -> None:
    assert examples(np.array(settled), np.array(lengths), np.array(speakers, np.int32)) == rows


def test_draw_writes_a_png(tmp_path: Path, rng: np.random.Generator) -> None:
    lengths = [7, 9, 8, 11, 7]
    heard = Heard(lengths, outputs=9)
    for row, length in enumerate(lengths):
        heard.add(row, rng.standard_normal((length, 9)).astype(np.float32), rng.uniform(0.001, 0.1, length))
    picture = tmp_path / "picture.png"
    draw(heard, np.array([0, 1, 2, 3, 4], np.int32), picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
