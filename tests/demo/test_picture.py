from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep.demo.picture import draw, examples, settled_after
from instep.demo.producers import Heard, make_producers

NEVER = np.inf


def test_settled_after() -> None:
    right = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], np.bool_)
    assert settled_after(right).tolist() == [1, 2, 3, NEVER, NEVER]


@pytest.mark.parametrize(
    ("settled", "rows"),
    [
        ([1, 1, 3, NEVER, 9, 2], [0, 2, 4, 3]),  # later are 2, 3 and 9, of which 3 is in the middle
        ([1, 1, 1, 1], [0, 3, 3, 3]),
    ],
)
def test_examples_go_from_certain_to_wrong(settled: list[float], rows: list[int]) -> None:
    assert examples(np.array(settled)) == rows


def test_draw_writes_a_png(tmp_path: Path, rng: np.random.Generator) -> None:
    producers = make_producers([np.zeros((length, 12), np.float32) for length in (7, 9, 8, 11, 7)])
    heard = Heard(producers, outputs=9)
    for row, producer in enumerate(producers):
        length = len(producer.frames)
        heard.add(row, rng.standard_normal((length, 9)).astype(np.float32), rng.uniform(0.001, 0.1, length))
    picture = tmp_path / "picture.png"
    draw(heard, np.array([0, 1, 2, 3, 4], np.int32), picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
