from __future__ import annotations

from pathlib import Path

from instep.bench.rounds import Run, in_turn


def test_ways_take_turns_and_the_first_round_is_a_warm_up() -> None:
    took: list[str] = []

    def way(name: str) -> float:
        took.append(name)
        return float(len(took))

    rounds: list[int] = []
    run = Run(Path(), rounds=3, advance=lambda: rounds.append(len(took)))
    samples = in_turn(run, {"a": lambda: way("a"), "b": lambda: way("b")})
    assert "".join(took) == "baabbaab"
    assert samples == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}
    assert rounds == [2, 4, 6, 8]


def test_a_load_is_scaled_down_to_something() -> None:
    assert Run(Path()).scaled(1000, 10) == 1000
    assert Run(Path(), scale=50).scaled(1000, 10) == 20
    assert Run(Path(), scale=50).scaled(100, 10) == 10
