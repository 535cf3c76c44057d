from __future__ import annotations

from pathlib import Path

import numpy as np

from instep.demo.picture import draw
from instep.demo.producers import Heard, make_producers


def test_draw_writes_a_png(tmp_path: Path, rng: np.random.Generator) -> None:
    producers = make_producers([np.zeros((length, 12), np.float32) for length in (7, 9, 8, 11, 7)])
    heard = Heard(producers, outputs=9)
    for row, producer in enumerate(producers):
        length = len(producer.frames)
        heard.add(row, rng.standard_normal((length, 9)).astype(np.float32), rng.uniform(0.001, 0.1, length))
    picture = tmp_path / "picture.png"
    draw(heard, np.array([0, 1, 2, 3, 4], np.int32), picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
