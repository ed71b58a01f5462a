"""A lift seen by a kit: simulated journeys give floor, motion, doors and who is trapped, sensors failing too."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.errors import ConfigError
from edge.driver import Quality
from edge.lifts.cabin import CERTAINTIES, Cabin, Delays, Trap
from edge.lifts.kit import KitCar, Sample
from simulators.lines.retrofit import LANDINGS, Broken, Journey, Tick, told
from simulators.lines.talker import Talker, Told
from tests.line_site import LineSite


class Ride:
    """A journey and the car that is inferred from it."""

    def __init__(self, floor: int = 1, weather_pa_h: float = 0.0, home: int | None = None, seed: int = 1) -> None:
        self.journey = Journey(LANDINGS, floor, weather_pa_h, seed)
        self.journey.home_floor = home
        self.car = KitCar("lift", LANDINGS, Delays(), 0.75, home, 60_000, 600_000)
        self.said: list[tuple[float, dict[str, float]]] = []

    def go(self, ticks: Iterable[Tick]) -> Ride:
        for tick in ticks:
            if tick.has_air:
                self.car.air(tick.t_s, tick.pressure_pa, tick.temperature_c)
            inputs = (tick.inputs[name] for name in ("door", "motion", "button", "service", "home"))
            said = self.car.sample(tick.t_s, round(tick.t_s * 1000), Sample(tick.upward_g, *inputs))
            self.said += [(tick.t_s, dict(one.values)) for _, one in said]
        return self

    def last(self, metric: str) -> float | None:
        return next((values[metric] for _, values in reversed(self.said) if metric in values), None)

    def codes(self) -> list[tuple[float, float]]:
        return [(at_s, values["fault_code"]) for at_s, values in self.said if "fault_code" in values]

    def certainties(self) -> set[float]:
        return {values["trapped_certainty"] for _, values in self.said if "trapped_certainty" in values}

    def board(self) -> Ride:
        """Let somebody in; the doors close."""
        self.journey.door_closed, self.journey.people = False, True
        self.go(self.journey.stand(5))
        self.journey.door_closed = True
        return self.go(self.journey.stand(2))

    def found(self) -> Ride:
        """Let it find out on which floor it is: to the top and to the bottom."""
        return self.go(self.journey.trip(8, people=True)).go(self.journey.trip(-1, people=True))


@pytest.mark.parametrize("weather_pa_h", [100.0, -100.0, 0.0])
def test_every_trip_of_a_day_ends_on_the_right_floor_whatever_the_weather(weather_pa_h: float) -> None:
    ride = Ride(weather_pa_h=weather_pa_h).found()
    floors = [8, 1, 4, -1, 7, 3]
    for number, floor in enumerate(floors):
        ride.go(ride.journey.stand(300)).go(ride.journey.trip(floor, people=bool(number % 3)))
        assert (ride.car.travel.floor, ride.car.travel.moving) == (floor, False)
    assert ride.car.travel.rides == len(floors) + 2
    assert ride.car.travel.lost == 0
    assert {code for _, code in ride.codes()} == {0.0}
    assert ride.certainties() == {0.0}
    assert ride.car.trouble(ride.journey.t_s) == ""


@pytest.mark.parametrize("speed_mps", [0.5, 1.75, 2.5])
@pytest.mark.parametrize("stack_pa", [15.0, -15.0])
def test_doors_that_open_early_and_change_the_air_move_no_floor(speed_mps: float, stack_pa: float) -> None:
    ride = Ride()
    ride.journey.speed_mps, ride.journey.open_after_s, ride.journey.stack_pa = speed_mps, 0.4, stack_pa
    ride.found()
    for floor in (3, 4, 1, 7, -1, 5):
        ride.go(ride.journey.trip(floor, people=True))
        assert (ride.car.travel.floor, ride.car.travel.moving) == (floor, False)
    assert (ride.car.travel.rides, ride.car.travel.lost) == (8, 0)


@pytest.mark.parametrize("gust_pa", [10.0, -10.0])
def test_a_gust_in_the_shaft_is_no_ride(gust_pa: float) -> None:
    ride = Ride().found()
    for off_pa in (gust_pa, 0.0) * 3:
        ride.journey.gust_pa = off_pa
        ride.go(ride.journey.stand(5))
    assert (ride.car.travel.rides, ride.car.travel.floor) == (2, -1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_random_days_with_weather_draught_and_four_trapped_passengers(seed: int) -> None:
    luck = random.Random(seed)
    ride = Ride(weather_pa_h=luck.choice([-100, -30, 30, 100]), seed=seed)
    journey = ride.journey
    journey.speed_mps, journey.stack_pa = luck.choice([0.5, 1.0, 1.75, 2.5]), luck.uniform(-15, 15)
    ride.found()
    for _ in range(40):
        journey.open_after_s, journey.gust_pa = luck.uniform(0.3, 2), luck.uniform(-6, 6)
        ride.go(journey.stand(luck.uniform(2, 60)))
        floor = luck.choice([one for one, height_m in LANDINGS.items() if abs(height_m - journey.height_m) > 0.1])
        ride.go(journey.trip(floor, people=luck.random() < 0.8))
        assert (ride.car.travel.floor, ride.car.travel.lost) == (floor, 0)
    assert ride.certainties() == {0.0}
    for height_m in (LANDINGS[3] + 1.5, LANDINGS[6] + 1.6, LANDINGS[2], LANDINGS[8] - 1.5):
        ride.board().go(journey.ride(height_m))
        stopped_s, levelled = journey.t_s, height_m in LANDINGS.values()
        ride.go(journey.stand(150))
        at_s, code = ride.codes()[-1]
        assert code == 93
        assert (90 if levelled else 45) <= at_s - stopped_s <= (97 if levelled else 52)
        ride.go(journey.ride(LANDINGS[1]))
        journey.door_closed = journey.people = False
        ride.go(journey.stand(8))
        journey.door_closed = True
        ride.go(journey.stand(5))
        assert ride.codes()[-1][1] == 0


def test_the_floor_is_left_out_until_it_is_known_and_a_home_magnet_tells_it_at_once() -> None:
    ride = Ride(floor=3).go(islice(Journey(LANDINGS, 3).stand(60), 1000))
    assert ride.last("floor") is None
    assert Ride(floor=3, home=3).go(Journey(LANDINGS, 3).stand(1)).last("floor") is None  # not at the magnet yet
    home = Ride(floor=1, home=1)
    assert home.go(home.journey.stand(1)).last("floor") == 1


def test_somebody_between_two_floors_is_trapped_after_45_seconds_and_until_the_doors_open() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4] + 1.5))
    stopped_s = ride.journey.t_s
    ride.go(ride.journey.stand(70))
    (at_s, code) = ride.codes()[-1]
    assert code == 93
    assert 45 <= at_s - stopped_s <= 50
    assert ride.last("trapped_certainty") == CERTAINTIES[False, 2][0]
    told_with = next(values for _, values in ride.said if values.get("fault_code") == 93)
    assert (told_with["occupied"], told_with["door_closed"]) == (1, 1)
    assert list(told_with)[-1] == "fault_code"
    ride.journey.door_closed = False
    assert ride.go(ride.journey.stand(1)).codes()[-1][1] == 0
    assert ride.last("trapped_certainty") == 0


def test_the_button_is_told_at_once_and_raises_the_certainty() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4] + 1.5))
    stopped_s = ride.journey.t_s
    ride.go(ride.journey.stand(5))
    ride.journey.button = True
    pressed_s = ride.journey.t_s
    ride.go(ride.journey.stand(1))
    ride.journey.button = False
    ride.go(ride.journey.stand(30))
    (button_s, button), (trapped_s, trapped) = ride.codes()[-2:]
    assert (button, trapped) == (90, 93)
    assert button_s - pressed_s < 0.1
    assert 15 <= trapped_s - stopped_s <= 20
    assert ride.last("trapped_certainty") == CERTAINTIES[True, 2][0] == 1.0


def test_somebody_behind_closed_doors_at_a_landing_is_trapped_after_90_seconds() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4]))
    stopped_s = ride.journey.t_s
    ride.go(ride.journey.stand(120))
    assert ride.codes()[-1][1] == 93
    assert 90 <= ride.codes()[-1][0] - stopped_s <= 95


def test_an_empty_car_an_open_door_and_a_technician_are_nobody_trapped() -> None:
    ride = Ride().found()
    ride.go(ride.journey.trip(5, people=False)).go(ride.journey.stand(900))  # called home, doors stay closed
    assert ride.last("occupied") == 0
    ride.board()
    ride.journey.door_closed = False
    ride.go(ride.journey.stand(300))  # loading
    ride.journey.door_closed = True
    ride.journey.service = True
    ride.go(ride.journey.stand(300))
    assert ride.last("service_mode") == 2
    assert ride.certainties() == {0.0}
    assert {code for _, code in ride.codes()} == {0.0}


@pytest.mark.parametrize("weather_pa_h", [100.0, -100.0])
def test_weather_is_no_ride_and_no_place_between_floors(weather_pa_h: float) -> None:
    ride = Ride(weather_pa_h=weather_pa_h).found()
    rides = ride.car.travel.rides
    ride.go(ride.journey.stand(1800))
    assert ride.car.travel.rides == rides
    assert ride.car.travel.outside is False


# --- sensors that fail ---


def test_a_presence_sensor_that_sticks_in_a_parked_car_traps_nobody_and_is_said() -> None:
    ride = Ride().found().go(Journey(LANDINGS, -1).stand(0))
    ride.go(ride.journey.stand(120))
    ride.journey.broken.add("motion_stuck")
    ride.go(ride.journey.stand(500))
    assert ride.last("occupied") == 0
    assert ride.certainties() == {0.0}
    ride.go(ride.journey.stand(120))
    assert "presence sensor says motion" in ride.car.trouble(ride.journey.t_s)
    assert ride.car.cabin.occupied(ride.journey.t_s) is None  # left out, and not 0
    ride.journey.broken.clear()
    ride.go(ride.journey.stand(5))
    assert ride.car.trouble(ride.journey.t_s) == ""


def test_one_that_sees_nobody_is_said_after_twenty_rides_and_the_button_still_counts() -> None:
    ride = Ride().found()
    ride.journey.broken.add("motion_dead")
    for number in range(20):
        ride.go(ride.journey.trip(8 if number % 2 else 1, people=True))
    assert "saw nobody in 20 rides" in ride.car.trouble(ride.journey.t_s)
    ride.board().go(ride.journey.ride(LANDINGS[4] + 1.5))
    ride.journey.button = True
    ride.go(ride.journey.stand(100))
    assert 90 in [code for _, code in ride.codes()]
    assert ride.last("trapped_certainty") == CERTAINTIES[True, 0][0]


@pytest.mark.parametrize(
    ("broken", "words"), [("barometer", "no pressure of the air"), ("accelerometer", "no acceleration")]
)
def test_without_one_motion_sensor_the_other_still_finds_who_is_trapped(broken: Broken, words: str) -> None:
    ride = Ride().found()
    ride.journey.broken.add(broken)
    ride.go(ride.journey.trip(5, people=True)).go(ride.journey.trip(2, people=True))
    assert words in ride.car.trouble(ride.journey.t_s)
    rides = ride.car.travel.rides
    ride.board().go(ride.journey.ride(LANDINGS[6]))
    assert ride.last("moving") == 1
    ride.go(ride.journey.stand(110))
    assert ride.last("moving") == 0
    assert ride.car.travel.rides == rides + 1
    assert ride.codes()[-1][1] == 93
    assert (ride.car.travel.floor is None) == (broken == "barometer")


def test_without_both_nothing_is_claimed_and_nobody_is_freed() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4])).go(ride.journey.stand(100))
    assert ride.codes()[-1][1] == 93
    ride.journey.broken |= {"accelerometer", "barometer"}
    ride.go(ride.journey.stand(60))
    before = len([1 for _, values in ride.said if "moving" in values])
    ride.go(ride.journey.stand(120))
    assert len([1 for _, values in ride.said if "moving" in values]) == before
    assert ride.codes()[-1][1] == 93


def test_a_presence_sensor_that_falls_silent_frees_nobody() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4])).go(ride.journey.stand(100))
    ride.journey.broken.add("motion_dead")
    assert ride.go(ride.journey.stand(1200)).codes()[-1][1] == 93
    assert ride.last("occupied") == 1


@pytest.mark.parametrize("broken", ["door_closed", "door_open"])
def test_a_door_magnet_that_sticks_is_said_and_lowers_the_certainty(broken: Broken) -> None:
    ride = Ride().found()
    ride.journey.broken.add(broken)
    for floor in (3, 6, 1, 5, 2, 7):
        ride.go(ride.journey.trip(floor, people=True))
    assert "door magnet" in ride.car.trouble(ride.journey.t_s)
    ride.said.clear()
    ride.board().go(ride.journey.ride(LANDINGS[4])).go(ride.journey.stand(120))
    assert ride.last("door_closed") is None
    assert 0 < (ride.last("trapped_certainty") or 0) < CERTAINTIES[False, 2][1]


def test_a_kit_that_starts_while_somebody_is_trapped_does_not_say_that_nobody_is() -> None:
    ride = Ride().found().board()
    ride.go(ride.journey.ride(LANDINGS[4])).go(ride.journey.stand(100))
    ride.car = KitCar("lift", LANDINGS, Delays(), 0.75, None, 60_000, 600_000)
    ride.said.clear()
    ride.go(ride.journey.stand(60))
    assert ride.codes() == []
    assert ride.certainties() == set()
    assert ride.go(ride.journey.stand(120)).codes()[-1][1] == 93


@given(st.lists(st.tuples(st.floats(0.01, 30), *[st.sampled_from([None, False, True])] * 3), max_size=40))
def test_nobody_is_trapped_in_a_car_that_rides_is_open_or_served(
    steps: list[tuple[float, bool | None, bool | None, bool | None]],
) -> None:
    cabin, trap, t_s = Cabin(), Trap(Delays(), 0.75), 0.0
    for passed_s, closed, motion, pressed in steps:
        t_s += passed_s
        cabin.step(t_s, door_closed=closed, motion=motion)
        trap.press(t_s, pressed)
        seen = cabin.evidence(t_s)
        assert seen in (0, 1, 2)
        trap.step(t_s, seen=seen, standing=True, closed=cabin.closed, outside=None, service=False)
        assert 0 <= trap.certainty <= 1
        if cabin.closed is False:
            assert (trap.certainty, trap.code in (0, 90)) == (0, True)
        copy = Trap(Delays(0, 0, 0), 0.75)
        copy.step(t_s, seen=2, standing=False, closed=True, outside=True, service=False)
        copy.step(t_s + 9, seen=2, standing=True, closed=True, outside=True, service=True)
        assert copy.certainty == 0


# --- on the line ---


@pytest.fixture
def port(tmp_path: Path) -> Path:
    return tmp_path / "kit"


def sample_of(port: Path) -> str:
    floors = ", ".join(f"{floor}: {height}" for floor, height in LANDINGS.items())
    return (
        f"driver: elevator_retrofit\nport: {port}\nsilence: 1s\ndevices:\n"
        f"  - {{device: lift-1, station: 1, floors: {{{floors}}}, inputs: [door, motion, home], home_floor: 1}}"
    )


def trapped(journey: Journey) -> Iterator[Tick]:
    journey.home_floor = 1
    yield from journey.stand(2)
    journey.door_closed, journey.people = False, True
    yield from journey.stand(5)
    journey.door_closed = True
    yield from journey.stand(2)
    yield from journey.ride(LANDINGS[3] + 1.5)
    yield from journey.stand(100_000)


def test_a_kit_on_a_line_tells_who_is_trapped(port: Path) -> None:
    ticks = trapped(Journey(LANDINGS, 1))

    def source(_: float) -> list[Told]:  # twenty times as fast as it happens: all times are the kit's
        return [frame for tick in islice(ticks, 20) for frame in told(1, tick)]

    talker = Talker(port, 115_200, source, 0.05)
    talker.start()
    site = LineSite(sample_of(port))
    try:
        site.until(lambda: 93.0 in site.of("lift-1", "fault_code"), what="the trapped passenger", within_s=30)
        assert site.quality("lift-1") is Quality.GOOD
        assert site.of("lift-1", "floor") == [1.0, 2.0, 3.0]
        talker.say((1, 16, b"short"))
        site.until(lambda: site.dropped("bad_payload") == 1)
        talker.fault = "dead"
        site.until(lambda: site.quality("lift-1") is Quality.NO_ANSWER)
        assert site.of("lift-1", "fault_code")[-1] == 93.0
    finally:
        site.hosts.stop(0)
        talker.stop()


@pytest.mark.parametrize(
    ("kit", "expected"),
    [
        ("floors: {1: 0}", "floors: expected at least two"),
        ("floors: {1: 0, 2: 0.5}", "two are less than 1.5 m apart"),
        ("floors: {1: 0, 2: 3}, home_floor: 7, inputs: [motion, home]", "home_floor: 7 is none of the floors"),
        ("floors: {1: 0, 2: 3}, home_floor: 1", "home_floor and the input `home` go together"),
        ("floors: {1: 0, 2: 3}, inputs: [door]", "without `motion` or `button`"),
        ("floors: {1: 0, 2: 3}, upward: w", "upward"),
    ],
)
def test_a_wrong_kit_is_refused(port: Path, kit: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LineSite(f"driver: elevator_retrofit\nport: {port}\ndevices:\n  - {{device: a, station: 1, {kit}}}")
    assert expected in str(caught.value)
