"""Random places: the same for the same seed, unlike each other, and what the benchmark says of one of them."""

from __future__ import annotations

from itertools import islice

import numpy as np

from benchmarks.camera import places
from simulators.lines.film import Film


def test_a_seed_gives_the_same_film_and_another_seed_another() -> None:
    one, again, other = ([image for _, image in islice(Film(seed).frames(5.0), 3)] for seed in (104, 104, 102))
    assert all(np.array_equal(first, second) for first, second in zip(one, again, strict=True))
    assert one[0].shape != other[0].shape or not np.array_equal(one[0], other[0])
    assert Film(104).script == Film(104).script != Film(102).script


def test_at_a_place_to_develop_on_all_is_found_in_time_and_nothing_else_is_said() -> None:
    result = places.run(104)
    assert {one.what for one in result.found} == {"garbage", "moved"}
    assert all(one.due and one.delay_s is not None and one.delay_s <= places.BAR_S for one in result.found)
    assert result.wrong_health == result.wrong_events == ()
    figures = places.summary([result])
    assert figures["kinds"]["garbage"]["in_time"] == figures["kinds"]["moved"]["in_time"] == 1
    assert figures["false_events_told"] == figures["false_health"] == 0
    assert list(places.notes([result])) == []
