"""What a driver stamped just before the clock stepped, and handed over just after."""

from __future__ import annotations

import pytest

from citybrain.clock import monotonic_s
from citybrain.model import Reading
from edge.steps import Steps, ahead_ms


class Stepping:
    """A clock that runs on the monotonic one, and steps."""

    def __init__(self) -> None:
        self.off_ms = 1_790_000_000_000

    def now_ms(self) -> int:
        return round(monotonic_s() * 1000) + self.off_ms


@pytest.mark.parametrize("step_ms", [7_200_000, 3_000, -7_200_000])
def test_what_is_under_way_when_the_clock_steps_moves_along(step_ms: int) -> None:
    clock = Stepping()
    steps = Steps(clock)
    before = Reading("d", clock.now_ms() - 40, {"value": 1.0})
    assert steps.look() == 0
    assert steps.under_way(before) == before
    clock.off_ms += step_ms
    assert abs(steps.look() - step_ms) <= 1
    assert steps.ahead_ms == ahead_ms(clock)
    assert abs(steps.under_way(before).observed_at - before.observed_at - step_ms) <= 1
    after = Reading("d", clock.now_ms(), {"value": 1.0})
    assert steps.under_way(after) == after
    assert steps.look() == 0


def test_a_clock_that_is_slewed_moves_nothing_that_was_stamped() -> None:
    clock = Stepping()
    steps = Steps(clock)
    before = Reading("d", clock.now_ms(), {"value": 1.0})
    clock.off_ms -= 100
    assert abs(steps.look() + 100) <= 1
    assert steps.under_way(before) == before
