"""What happens at a random place: what is planted, what only passes, and when. All of it follows from a generator."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from simulators.lines.figures import BUS_HIGH, BUS_LONG, BUS_WIDE, CAR_HIGH, CAR_LONG, CAR_WIDE, Colour, colour_of
from simulators.lines.places import Corners, Place
from simulators.lines.video import What

DURATION_S = 120.0
DWELL_S = {"garbage": 8.0, "lane": 30.0, "stall": 30.0}
LASTS_S = {"garbage": 20.0, "lane": 42.0, "stall": 42.0, "crowd": 25.0}
CALM_S = 20.0  # nothing is planted before
FAULT_S, FAULT_LASTS_S = 96.0, 9.0
SWITCH_S = 80.0  # about when a camera goes over to infrared
BUS_S = 20.0  # a bus waits at the lights for so long
FAULTS: tuple[What, ...] = ("occluded", "half_occluded", "blur", "freeze", "dark", "bright", "moved")
Kind = Literal["walker", "car", "bus", "bird", "insect"]


class Event(msgspec.Struct, frozen=True):
    """What is planted. at: where it stands, shares of the picture; size: of a bag, in a person's heights."""

    what: What
    start_s: float
    end_s: float
    at: tuple[float, float] = (0.5, 0.5)
    size: float = 0.4
    colour: Colour = (30.0, 30.0, 30.0)
    shape: int = 0


class Passing(msgspec.Struct, frozen=True):
    """Who or what goes from one place to another (shares), and may stop on the way, at a share of it."""

    kind: Kind
    start_s: float
    takes_s: float
    source: tuple[float, float]
    goal: tuple[float, float]
    colours: tuple[Colour, Colour]
    stops_at: float = 1.0
    stops_s: float = 0.0

    def place(self, at_s: float) -> tuple[float, float] | None:
        """Return where it is at a time, None before and after."""
        passed_s = at_s - self.start_s
        halt_s = self.stops_at * self.takes_s
        passed_s = min(passed_s, halt_s) if passed_s < halt_s + self.stops_s else passed_s - self.stops_s
        if at_s < self.start_s or passed_s > self.takes_s:
            return None
        share = passed_s / self.takes_s
        return tuple(a + (b - a) * share for a, b in zip(self.source, self.goal, strict=True))  # type: ignore[return-value]

    def walks(self, at_s: float) -> bool:
        """Return whether it moves at a time."""
        passed_s = at_s - self.start_s - self.stops_at * self.takes_s
        return not 0.0 <= passed_s < self.stops_s


class Script(msgspec.Struct, frozen=True):
    """What is planted, what passes, and what the square of a place is watched for."""

    events: tuple[Event, ...]
    passing: tuple[Passing, ...]
    square_sees: Literal["stall", "crowd"]
    areas: dict[str, float]  # by region: about half of what is planted there fills
    switch_s: float


def write(rng: np.random.Generator, place: Place) -> Script:
    """Write what happens."""
    square_sees: Literal["stall", "crowd"] = "stall" if rng.random() < 0.5 else "crowd"
    events: list[Event] = []
    if rng.random() > 0.12:
        kinds: list[What] = ["garbage", "lane", square_sees]
        first = kinds[rng.integers(3)]
        events.append(_event(rng, place, first))
        if rng.random() < 0.3:
            other = [one for one in kinds if one != first][rng.integers(2)]
            events.append(_event(rng, place, other))
        start_s = FAULT_S + float(rng.uniform(0.0, 8.0))
        events.append(Event(FAULTS[rng.integers(len(FAULTS))], start_s, start_s + FAULT_LASTS_S))
    passing = [*_walkers(rng, place), *_traffic(rng, place, events), *_specks(rng, place)]
    areas = {"garbage": 0.006, "lane": _car_share(place), "square": 0.5 * _table_share(place)}
    return Script(tuple(events), tuple(passing), square_sees, areas, SWITCH_S + float(rng.uniform(0.0, 5.0)))


def _event(rng: np.random.Generator, place: Place, what: What) -> Event:
    start_s = CALM_S + float(rng.uniform(2.0, 14.0))
    region = {"garbage": place.bins, "lane": place.lane}.get(what, place.square)
    at = _middle(region) if what == "lane" else _within(rng, region)
    colour, size = colour_of(rng), float(rng.uniform(0.3, 0.65))
    return Event(what, start_s, start_s + LASTS_S[what], at, size, colour, int(rng.integers(3)))


def _walkers(rng: np.random.Generator, place: Place) -> list[Passing]:
    """Return people who cross the pavement; some stop on it, for less than what is left there must stand."""
    found, at_s, rate_s = [], float(rng.uniform(0.0, 10.0)), float(rng.choice([6.0, 12.0, 30.0]))
    low, high = (min(y for _, y in place.bins), max(y for _, y in place.bins))
    while at_s < DURATION_S:
        down, left = float(rng.uniform(low, high)), bool(rng.random() < 0.5)
        source, goal = ((-0.06, down), (1.06, float(rng.uniform(low, high))))
        speed = 0.9 * place.tall_at(down) / place.columns  # about 1.5 m a second
        stops_s = float(rng.uniform(2.0, DWELL_S["garbage"] - 2.5)) if rng.random() < 0.25 else 0.0
        colours = colour_of(rng), colour_of(rng)
        found.append(
            Passing(
                "walker", at_s, 1.1 / speed, *((source, goal) if left else (goal, source)), colours,
                float(rng.uniform(0.2, 0.8)) if stops_s else 1.0, stops_s,
            )
        )  # fmt: skip
        at_s += float(rng.exponential(rate_s))
    return found


def _traffic(rng: np.random.Generator, place: Place, events: list[Event]) -> list[Passing]:
    """Return cars that drive through, and a bus that waits at the lights where nobody is to block the lane."""
    found, at_s = [], float(rng.uniform(0.0, 20.0))
    every_s = float(rng.choice([6.0, 20.0, 60.0]))
    blocked = any(one.what == "lane" for one in events)
    if not blocked and _bus_share(place) < 0.3 and rng.random() < 0.5:
        start_s = float(rng.uniform(22.0, 55.0))
        found.append(_drive(rng, place, "bus", start_s, 6.0, 0.5, BUS_S))
    while at_s < DURATION_S:
        waiting = any(one.kind == "bus" and one.start_s - 4.0 < at_s < one.start_s + 28.0 for one in found)
        parked = any(one.what == "lane" and one.start_s - 4.0 < at_s < one.end_s for one in events)
        if not waiting and not parked:
            found.append(_drive(rng, place, "car", at_s, float(rng.uniform(1.5, 4.0))))
        at_s += 1.5 + float(rng.exponential(every_s))
    return found


def _drive(
    rng: np.random.Generator,
    place: Place,
    kind: Kind,
    start_s: float,
    takes_s: float,
    at: float = 1.0,
    stops_s: float = 0.0,
) -> Passing:
    lane = np.array(place.lane)
    if place.across:
        down = float(lane[:, 1].min() * 0.25 + lane[:, 1].max() * 0.75)
        source, goal = (-0.7, down), (1.7, down)
    else:
        top, bottom = lane[:2].mean(axis=0), lane[2:].mean(axis=0)
        source, goal = tuple(top), tuple(bottom + 0.8 * (bottom - top))
    if rng.random() < 0.5:
        source, goal = goal, source
    return Passing(kind, start_s, takes_s, source, goal, (colour_of(rng), colour_of(rng)), at, stops_s)


def _specks(rng: np.random.Generator, place: Place) -> list[Passing]:
    """Return birds, and at night insects before the lens."""
    kind: Kind = "insect" if place.light in ("night", "infrared") else "bird"
    found = []
    for _ in range(int(rng.integers(0, 8))):
        ends = rng.uniform(-0.1, 1.1, (2, 2))
        start_s, takes_s = float(rng.uniform(0.0, DURATION_S)), float(rng.uniform(0.6, 2.0))
        grey: Colour = (40.0, 40.0, 40.0) if kind == "bird" else (230.0, 230.0, 230.0)
        found.append(Passing(kind, start_s, takes_s, tuple(ends[0]), tuple(ends[1]), (grey, grey)))
    return found


def _car_share(place: Place) -> float:
    tall = place.tall_at(_middle(place.lane)[1])
    car = tall * tall * CAR_HIGH * (CAR_LONG if place.across else CAR_WIDE)
    return float(np.clip(0.4 * car / (_area(place.lane) * place.columns * place.rows), 0.02, 0.5))


def _bus_share(place: Place) -> float:
    """Return how much of the picture a bus hides: one that hides most of it makes it no picture, and that is said."""
    tall = place.tall_at(_middle(place.lane)[1])
    wide = min(tall * (BUS_LONG if place.across else BUS_WIDE), place.columns)
    return wide * tall * BUS_HIGH / (place.columns * place.rows)


def _table_share(place: Place) -> float:
    tall = place.tall_at(_middle(place.square)[1])
    return float(np.clip(1.3 * tall**2 / (_area(place.square) * place.columns * place.rows), 0.05, 0.8))


def _middle(corners: Corners) -> tuple[float, float]:
    x, y = np.array(corners).mean(axis=0)
    return float(x), float(y)


def _within(rng: np.random.Generator, corners: Corners) -> tuple[float, float]:
    """Return a place well within a region."""
    shares = rng.dirichlet([2.0] * len(corners))
    x, y = (np.array(corners) * shares[:, None]).sum(axis=0)
    return float(x), float(y)


def _area(corners: Corners) -> float:
    x, y = np.array(corners).T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
