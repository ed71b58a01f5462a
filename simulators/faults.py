"""What goes wrong in the district, when, and what is due for it: the schedule and the truth file.

A schedule follows from (district, seed, origin, scenario) in blocks of a day (a week where the district is large), each
planned on its own, so a simulator that starts in the middle knows the same causes as one that ran from the beginning.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.errors import Damaged, NotFound
from citybrain.storage import OS_FILES
from simulators.causes import KIND, KINDS, Cause, Kind, begins_well, grid, kind_of, length_ms, make, suits
from simulators.district import District
from simulators.elevators import Lifts

Scenario = Literal["demo", "random"]

GAP_MS = HOUR_MS  # between two causes in one zone, building, gateway or camera, so that every alarm has one cause
DEMO_GAP_MS = 45 * MINUTE_MS  # longer than the desk waits after the last clear
DEMO_DENSITY = 5.0  # a visitor wants to see something every few minutes
DEMO_QUIET_MS = 10 * MINUTE_MS  # the planted causes have the stage until then
EARLIEST_MS = 5 * MINUTE_MS  # after the start of a block: the first readings are in by then
WEAK_GATEWAY, WEAK_SHARE = "gw-05", 0.7  # of the zone
STRONG_MPA = 0.25  # a burst that nobody overlooks
DEMO_CUT = "gw-05"  # the gateway that loses its line in the demo
WEEK_MS = 7 * DAY_MS  # a block of a large district
TRIES = 200
RIDES = 10  # a lift that nobody rides shakes nobody


class Spot(msgspec.Struct, frozen=True):
    """The place the truth names."""

    cell: str
    street: str
    grid: str


class Due(msgspec.Struct, frozen=True):
    """What a cause calls for: a case, a rescue for each of these cars, a maintenance order."""

    case: int = 0
    rescues: tuple[str, ...] = ()
    maintenance: int = 0


class Truth(msgspec.Struct, frozen=True):
    """One line of `truth.jsonl`. Times are Unix ms; `category` is None where nothing is due."""

    id: str
    kind: str
    start_ms: int
    end_ms: int
    subjects: tuple[str, ...]
    place: Spot
    unit: str
    due: Due
    category: str | None
    lookalike: bool


def truth_of(cause: Cause, district: District) -> Truth:
    """Return what is due for a cause, and where."""
    kind = kind_of(cause, district)
    cell = district.cells[district.devices[cause.centre].place.cell]
    due = Due(
        int(kind.due == "case"),
        cause.occupied if kind.due == "rescue" else (),
        int(kind.due == "maintenance"),
    )
    return Truth(
        cause.id,
        cause.kind,
        cause.start_ms,
        cause.end_ms,
        cause.subjects,
        Spot(cell.code, cell.street, cell.grid),
        district.handler(kind.department, cause.centre) if kind.due != "nothing" else "",
        due,
        kind.category,
        kind.due == "nothing",
    )


def write_truth(path: Path, lines: Iterable[Truth]) -> None:
    """Write a truth file whole."""
    OS_FILES.replace(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def read_truth(path: Path) -> list[Truth]:
    """Return the lines of a truth file; raises NotFound, or Damaged naming the byte."""
    if not path.exists():
        raise NotFound(f"{path}: no truth file; was this folder written by `citybrain simulate`?")
    found: list[Truth] = []
    at = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            found.append(msgspec.json.decode(line, type=Truth))
        except msgspec.DecodeError as error:
            raise Damaged(str(path), at, f"line {len(found) + 1} is no truth: {error}") from None
        at += len(line)
    return found


# --- planning ---------------------------------------------------------------------------------------------------


def areas_of(district: District, cause: Cause) -> frozenset[str]:
    """Return what a cause has to itself: a zone, building or camera; of a gateway, all that speak through it.

    A lorry's permit holds in its whole grid, so no water may be stolen there meanwhile.
    """
    found = area_of(district, cause.centre)
    if cause.kind in ("illegal_use", "sprinkler_lorry"):
        return found | {f"grid:{grid(district, cause.centre)}"}
    return found


def area_of(district: District, device: str) -> frozenset[str]:
    """Return the zone, building or camera a device is in or is; for a gateway, all that speak through it."""
    found = district.devices[device]
    if found.kind != "gateway":
        return frozenset({found.zone or found.building or found.id})
    return frozenset(area for name in district.of_gateway(device) for area in area_of(district, name))


class Agenda:
    """Who is busy when: no area has two causes within `gap_ms`."""

    def __init__(self, gap_ms: int) -> None:
        self._gap_ms = gap_ms
        self._busy: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def free(self, areas: Iterable[str], start_ms: int, end_ms: int) -> bool:
        """Return whether nothing else happens in these areas around a time."""
        gap = self._gap_ms
        return not any(
            start_ms - gap < end and start < end_ms + gap for area in areas for start, end in self._busy[area]
        )

    def enter(self, areas: Iterable[str], start_ms: int, end_ms: int) -> None:
        """Note that something happens there."""
        for area in areas:
            self._busy[area].append((start_ms, end_ms))


class Planner:
    """Draws the causes of a span of time (Unix ms) that begins `origin_ms` or later."""

    def __init__(self, district: District, seed: str, span: tuple[int, int], origin_ms: int, gap_ms: int) -> None:
        self._dice = random.Random(seed)
        self._district = district
        self._span = span[0], span[1] - gap_ms
        self._origin_ms = origin_ms
        self._agenda = Agenda(gap_ms)
        self._area = cache(lambda device: area_of(district, device))
        self._lift = cache(lambda device: Lifts(district, [district.devices[device]]))
        self.causes: list[Cause] = []

    def take(self, cause: Cause) -> None:
        """Take a cause as it is."""
        self.causes.append(cause)
        after_ms = round(KIND[cause.kind].after * MINUTE_MS)
        self._agenda.enter(areas_of(self._district, cause), cause.start_ms, cause.end_ms + after_ms)

    def fill(self, kind: Kind, count: int) -> None:
        """Take up to `count` causes of a kind; what finds no room in 200 tries is left out."""
        choose = chooser(self._district, kind)
        if choose is None:
            return
        for _ in range(count):
            for _ in range(TRIES):
                if self._try(kind, choose(self._dice)):
                    break

    def _try(self, kind: Kind, centre: str) -> bool:
        dice, device = self._dice, self._district.devices[centre]
        length = length_ms(dice, kind, device)
        room = self._span[1] - self._span[0] - length - EARLIEST_MS
        if room <= 0:
            return False
        start = self._span[0] + EARLIEST_MS + round(dice.uniform(0, room) / SECOND_MS) * SECOND_MS
        if not begins_well(kind, device, start, self._origin_ms):
            return False
        if not self._agenda.free(self._area(centre), start, start + length):
            return False
        if kind.name == "rough_ride" and self._lift(centre).rides(centre, start, start + length) < RIDES:
            return False
        cause = make(dice, self._district, kind.name, (start, start + length), centre)
        if not self._agenda.free(areas_of(self._district, cause), start, start + length):
            return False
        self.take(cause)
        return True


def chooser(district: District, kind: Kind) -> Callable[[random.Random], str] | None:
    """Return what draws a device that a kind can happen to, each zone and building as likely; None where none can."""
    able = [device for device in district.registry.devices if suits(kind, device)]
    if not able:
        return None
    if kind.at == "gateway":
        return _gateways([device.id for device in able], large(district))
    groups: dict[str, list[str]] = defaultdict(list)
    for device in able:
        groups[device.zone or device.building or device.id].append(device.id)
    names = sorted(groups)
    return lambda dice: dice.choice(groups[dice.choice(names)])


def _gateways(names: list[str], is_large: bool) -> Callable[[random.Random], str]:
    if is_large:
        return lambda dice: dice.choice(names)
    return lambda dice: WEAK_GATEWAY if dice.random() < WEAK_SHARE else dice.choice(names)


def large(district: District) -> bool:
    """Return whether a district has a city's rates."""
    return district.size != "zone"


def plan(
    district: District,
    seed: str,
    span: tuple[int, int],
    *,
    density: float = 1.0,
    gap_ms: int = GAP_MS,
    planted: Iterable[Cause] = (),
    origin_ms: int | None = None,
) -> list[Cause]:
    """Return the causes of a span of time (Unix ms), in order of their starts, none near another.

    `density` multiplies the daily rates.
    """
    planner = Planner(district, seed, span, span[0] if origin_ms is None else origin_ms, gap_ms)
    for cause in planted:
        planner.take(cause)
    share = (span[1] - span[0]) / DAY_MS * density
    for kind in KINDS:
        planner.fill(kind, round((kind.city_day if large(district) else kind.zone_day) * share))
    return sorted(planner.causes, key=lambda cause: (cause.start_ms, cause.id))


def demo(district: District, seed: int, origin_ms: int) -> list[Cause]:
    """Return the planted causes of a live run, at fixed times after its origin."""
    dice = random.Random(f"{seed}/demo")
    away = district.of_gateway(DEMO_CUT)
    zones, buildings = ([groups[name] for name in sorted(groups)] for groups in (district.zones, district.buildings))
    houses = [lifts for lifts in buildings if len(lifts) > 1 and not set(lifts) & set(away) and _coded(district, lifts)]

    def at(kind: str, second: float, minutes: float, group: tuple[str, ...], **strength: float) -> Cause:
        start = origin_ms + round(second * SECOND_MS)
        able = [name for name in group if suits(KIND[kind], district.devices[name])]
        cause = make(dice, district, kind, (start, start + round(minutes * MINUTE_MS)), dice.choice(able))
        return msgspec.structs.replace(cause, strength={**cause.strength, **strength})

    cut = at("power_cut_occupied", 120, 12, houses[3])
    burst = at("mains_burst", 70, 40, zones[6])
    while burst.strength["depth_mpa"] < STRONG_MPA:
        burst = at("mains_burst", 70, 40, zones[6])
    return [
        at("trapped", 12, 15, houses[0], code_s=1.0, button_s=3.0),
        at("knocked_over", 20, 60, zones[2], tilt_deg=60.0),
        at("illegal_use", 45, 8, zones[4]),
        burst,
        msgspec.structs.replace(cut, occupied=cut.subjects[:2]),
        at("authorised_use", 150, 8, zones[1]),
        at("gateway_offline", 240, 5, (DEMO_CUT,)),
    ]


def _coded(district: District, lifts: tuple[str, ...]) -> bool:
    return all("fault_code" in district.devices[lift].event_metrics for lift in lifts)


class Schedule:
    """The causes of a run, block by block from its origin, known to the devices they touch.

    A run that ends at `until_ms` has none that is not over an hour before, so that all that is due can be found.
    """

    def __init__(
        self,
        district: District,
        seed: int,
        origin_ms: int,
        scenario: Scenario = "random",
        until_ms: int | None = None,
    ) -> None:
        self.district = district
        self.seed = seed
        self.origin_ms = origin_ms
        self.scenario = scenario
        self.block_ms = WEEK_MS if large(district) else DAY_MS
        self._until_ms = until_ms
        self._block = cache(self._plan_block)
        self._touching = cache(self._touch)

    def _plan_block(self, block: int) -> tuple[Cause, ...]:
        until_ms = self._until_ms
        return tuple(c for c in self._draw_block(block) if until_ms is None or c.end_ms + GAP_MS <= until_ms)

    def _draw_block(self, block: int) -> list[Cause]:
        start = self.origin_ms + block * self.block_ms
        seed, end = f"{self.seed}/{self.scenario}/{block}", start + self.block_ms
        if self.scenario == "random":
            return plan(self.district, seed, (start, end), origin_ms=self.origin_ms)
        first = demo(self.district, self.seed, self.origin_ms) if block == 0 else []
        quiet = DEMO_QUIET_MS - EARLIEST_MS if block == 0 else 0
        density = 1.0 if large(self.district) else DEMO_DENSITY
        return plan(self.district, seed, (start + quiet, end), density=density, gap_ms=DEMO_GAP_MS, planted=first,
                    origin_ms=self.origin_ms)  # fmt: skip

    def _blocks(self, from_ms: int, to_ms: int) -> range:
        first = max((from_ms - self.origin_ms) // self.block_ms, 0)
        return range(first, max((to_ms - self.origin_ms) // self.block_ms, -1) + 1)

    def causes(self, from_ms: int, to_ms: int) -> list[Cause]:
        """Return the causes that start in [from, to), in order."""
        found = [cause for block in self._blocks(from_ms, to_ms) for cause in self._block(block)]
        return [cause for cause in found if from_ms <= cause.start_ms < to_ms]

    def _touch(self, block: int) -> dict[str, tuple[Cause, ...]]:
        touching: dict[str, list[Cause]] = defaultdict(list)
        for cause in self._block(block):
            for device in cause.subjects:
                touching[device].append(cause)
        return {device: tuple(causes) for device, causes in touching.items()}

    def around(self, devices: Iterable[str], from_ms: int, to_ms: int, margin_ms: int = HOUR_MS) -> list[Cause]:
        """Return the causes that touch any of these devices within `margin_ms` of [from, to), each once, in order."""
        first, last = from_ms - margin_ms, to_ms + margin_ms
        found: dict[str, Cause] = {}
        for block in self._blocks(first, last):  # a cause ends in the block it begins in
            touching = self._touching(block)
            for device in devices:
                for cause in touching.get(device, ()):
                    if cause.start_ms < last and first < cause.end_ms:
                        found[cause.id] = cause
        return sorted(found.values(), key=lambda cause: (cause.start_ms, cause.id))

    def offline(self, gateway: str, at_ms: int) -> bool:
        """Return whether a gateway has no uplink at a time."""
        near = self.around((gateway,), at_ms, at_ms + 1, 0)
        return any(cause.kind == "gateway_offline" and cause.start_ms <= at_ms < cause.end_ms for cause in near)
