"""What the lift drivers tell, before the rules that come along: who is trapped is raised, an ordinary day is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.assets.kinds import metrics_of
from citybrain.clock import SECOND_MS
from citybrain.layout import Layout
from citybrain.model import Edge, Lane, Reading
from edge.lifts.cabin import Delays
from edge.lifts.controllers import ADAPTERS, Occurrence, RunState, car
from edge.lifts.kit import KitCar, Sample
from rules.files import library
from rules.scenarios import DEVICE, ORIGIN_MS, DeviceKind, Said, Script, run_script
from simulators.lines.elevator import IDLE
from simulators.lines.retrofit import LANDINGS, Journey, Tick

Told = list[tuple[Lane, Reading]]


def transitions(folder: Path, rule: str, tag: str, told: Told) -> list[tuple[Edge, float]]:
    """Return what a rule makes of what was told: (raise or clear, s since the beginning)."""
    metrics, events = metrics_of("elevator", ["edge", tag])
    lanes = {Lane.TELEMETRY: set(metrics), Lane.EVENT: set(events)}
    for lane, reading in told:
        assert set(reading.values) <= lanes[lane]  # the platform takes each metric in the lane it came in
    said = [Said(one.observed_at, DEVICE, name, value) for _, one in told for name, value in one.values.items()]
    script = Script(said, [], [], [], [], end=said[-1].at)
    kind = DeviceKind("elevator", ("edge", tag), tuple(metrics), tuple(events))
    layout = Layout(folder)
    layout.make()
    found = run_script(next(one for one in library().rules if one.id == rule), kind, script, layout)
    assert found is not None
    return [(one.edge, (one.at_ms - ORIGIN_MS) / SECOND_MS) for one in found]


@pytest.mark.parametrize(("region", "trapped"), [("regional_93", 93), ("regional_11", 11)])
def test_a_controller_that_says_trapped(tmp_path: Path, region: str, trapped: int) -> None:
    lift = car(DEVICE, ADAPTERS[region](), 60_000, 600_000)
    stuck = RunState(1, 0, door_zone=False, door_closed=True, occupied=True, floor=4, active=trapped)
    told: Told = []
    for second in range(600):
        if second == 120:
            told += lift.occurrence(Occurrence("alarm", trapped), second * SECOND_MS)
        told += lift.state(stuck if 120 < second < 500 else IDLE, second * SECOND_MS)
    found = transitions(tmp_path, "elevator_trapped", "controller", told)
    assert [edge for edge, _ in found] == [Edge.RAISE, Edge.CLEAR]
    assert found[0][1] == pytest.approx(123, abs=2)


def test_a_button_that_is_pressed_for_a_second_in_a_car_that_stands(tmp_path: Path) -> None:
    lift = car(DEVICE, ADAPTERS["regional_93"](), 60_000, 600_000)
    stuck = RunState(1, 0, door_zone=False, door_closed=True, occupied=True, floor=4)
    told: Told = []
    for tenth in range(3000):
        if tenth in (1000, 1010):
            told += lift.occurrence(Occurrence("alarm", 90, begun=tenth == 1000), tenth * 100)
        told += lift.state(stuck, tenth * 100) + lift.tick(tenth * 100)
    found = transitions(tmp_path, "elevator_trapped", "controller", told)
    edge, at_s = found[0]
    assert edge is Edge.RAISE
    assert at_s == pytest.approx(102, abs=0.5)


class Day:
    """A journey, and what a kit told of it."""

    def __init__(self) -> None:
        self.journey = Journey(LANDINGS, 1, weather_pa_h=100.0)
        self.car = KitCar(DEVICE, LANDINGS, Delays(), 0.75, None, 60_000, 600_000)
        self.told: Told = []
        for floor in (8, -1, 3, 5, 1, 7):
            self.go(list(self.journey.trip(floor, people=True)))
            self.go(list(self.journey.stand(60)))

    def go(self, ticks: list[Tick]) -> None:
        for tick in ticks:
            if tick.has_air:
                self.car.air(tick.t_s, tick.pressure_pa, tick.temperature_c)
            inputs = (tick.inputs[name] for name in ("door", "motion", "button", "service"))
            self.told += self.car.sample(tick.t_s, round(tick.t_s * 1000), Sample(tick.upward_g, *inputs))


@pytest.mark.parametrize("rule", ["elevator_trapped", "elevator_trapped_inferred"])
def test_a_kit_on_an_ordinary_day_and_on_one_that_ends_between_floors(tmp_path: Path, rule: str) -> None:
    day = Day()
    assert transitions(tmp_path / "calm", rule, "retrofit", day.told) == []
    journey = day.journey
    journey.door_closed, journey.people = False, True
    day.go(list(journey.stand(5)))
    journey.door_closed = True
    day.go([*journey.stand(2), *journey.ride(LANDINGS[4] + 1.5)])
    stopped_s = journey.t_s
    day.go(list(journey.stand(240)))
    journey.door_closed, journey.people = False, False
    day.go(list(journey.stand(60)))
    found = transitions(tmp_path / "trapped", rule, "retrofit", day.told)
    assert [edge for edge, _ in found] == [Edge.RAISE, Edge.CLEAR]
    expected_s = {"elevator_trapped": 45 + 2, "elevator_trapped_inferred": 90}[rule]
    assert found[0][1] - stopped_s == pytest.approx(expected_s, abs=5)
