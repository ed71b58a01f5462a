"""What goes wrong in the district, when, and what is due for it: the schedule and the truth file.

A schedule follows from (district, seed, origin, scenario) in blocks of a day, each planned on its own, so a simulator
that starts in the middle knows the same causes as one that ran from the beginning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.errors import Damaged, NotFound
from citybrain.storage import OS_FILES
from simulators.district import District

Scenario = Literal["demo", "random"]
Scope = Literal["zone", "building", "gateway"]

GAP_MS = HOUR_MS  # between two causes in one zone or building, so that every alarm has one cause
DEMO_GAP_MS = 45 * MINUTE_MS  # longer than the desk waits after the last clear
DEMO_DENSITY = 5.0  # a visitor wants to see something every few minutes
DEMO_QUIET_MS = 10 * MINUTE_MS  # the planted causes have the stage until then
ANNOUNCED_MS = 60 * SECOND_MS  # an authorised use is entered this long before it starts
PERMIT_AFTER_MS = 2 * MINUTE_MS
EARLIEST_MS = 5 * MINUTE_MS  # after the start of a day: the first readings are in by then
WEAK_GATEWAY, WEAK_SHARE = "gw-05", 0.7
KEEP_MS = 6 * HOUR_MS  # causes this long over have no effect left


class Kind(msgspec.Struct, frozen=True):
    """A kind of cause: how wide, how many a day, how long (minutes), and what is due for it."""

    name: str
    scope: Scope
    per_day: int
    minutes: tuple[float, float]
    due: Literal["case", "rescue", "maintenance", "nothing"]
    category: str | None
    unit: str


# Wide causes are placed first. Rates are far above a real district's: two days must mean something in statistics.
KINDS = (
    Kind("gateway_offline", "gateway", 2, (10, 60), "maintenance", "gateway_offline", "sensor-ops"),
    Kind("mains_burst", "zone", 3, (40, 120), "case", "water_main_burst", "water"),
    Kind("power_cut_occupied", "building", 3, (10, 30), "rescue", "elevator_trapped", "lift-rescue"),
    Kind("power_cut_empty", "building", 3, (10, 30), "nothing", None, ""),
    Kind("battery_low", "zone", 3, (120, 240), "maintenance", "battery", "sensor-ops"),
    Kind("knocked_over", "zone", 4, (60, 180), "case", "hydrant_damaged", "water"),
    Kind("low_pressure", "zone", 5, (20, 60), "case", "hydrant_no_pressure", "water"),
    Kind("illegal_use", "zone", 6, (5, 20), "case", "hydrant_illegal_use", "water"),
    Kind("authorised_use", "zone", 5, (5, 20), "nothing", None, ""),
    Kind("trapped", "building", 5, (15, 40), "rescue", "elevator_trapped", "lift-rescue"),
    Kind("door_failure", "building", 5, (12, 25), "case", "elevator_door_failure", "lift-maintenance"),
    Kind("inspection", "building", 4, (20, 45), "nothing", None, ""),
)
KIND = {kind.name: kind for kind in KINDS}


class Cause(msgspec.Struct, frozen=True):
    """One thing that happens. `subjects` are the devices it touches, `centre` the one it is at.

    `occupied` are the cars with passengers in them. `strength` holds the kind's own numbers, units in their names.
    """

    id: str
    kind: str
    start_ms: int
    end_ms: int
    centre: str
    subjects: tuple[str, ...]
    strength: dict[str, float] = {}
    occupied: tuple[str, ...] = ()

    @property
    def permit(self) -> tuple[int, int]:
        """From when until when (Unix ms) the use is permitted; for `authorised_use`."""
        return self.start_ms - ANNOUNCED_MS // 2, self.end_ms + PERMIT_AFTER_MS


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
    kind = KIND[cause.kind]
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
        kind.unit,
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


def _gateway_areas(district: District, gateway: str) -> set[str]:
    return {area for name in district.of_gateway(gateway) for area in area_of(district, name)}


def area_of(district: District, device: str) -> set[str]:
    """Return the zone or building a device is in; for a gateway, all that speak through it."""
    found = district.devices[device]
    if found.kind == "gateway":
        return _gateway_areas(district, device)
    return {found.zone or found.building}


def fits(district: District, cause: Cause, others: Iterable[Cause], gap_ms: int) -> bool:
    """Return whether no other cause is within `gap_ms` of this one in the same zone, building or gateway."""
    mine = area_of(district, cause.centre)
    return not any(
        cause.start_ms - gap_ms < other.end_ms
        and other.start_ms < cause.end_ms + gap_ms
        and mine & area_of(district, other.centre)
        for other in others
    )


def plan(
    district: District,
    seed: str,
    span: tuple[int, int],
    *,
    density: float = 1.0,
    gap_ms: int = GAP_MS,
    planted: Iterable[Cause] = (),
) -> list[Cause]:
    """Return the causes of a span of time (Unix ms), in order of their starts, none near another.

    `density` multiplies the daily rates; what finds no room in 200 tries is left out.
    """
    dice = random.Random(seed)
    causes = list(planted)
    share = (span[1] - span[0]) / DAY_MS * density
    for kind in KINDS:
        for _ in range(round(kind.per_day * share)):
            for _ in range(200):
                cause = _draw(dice, district, kind, (span[0], span[1] - gap_ms))
                if cause is not None and fits(district, cause, causes, gap_ms):
                    causes.append(cause)
                    break
    return sorted(causes, key=lambda cause: (cause.start_ms, cause.id))


def _draw(dice: random.Random, district: District, kind: Kind, span: tuple[int, int]) -> Cause | None:
    length = round(dice.uniform(*kind.minutes) * MINUTE_MS)
    room = span[1] - span[0] - length - EARLIEST_MS
    if room <= 0:
        return None
    start = span[0] + EARLIEST_MS + round(dice.uniform(0, room) / SECOND_MS) * SECOND_MS
    return make(dice, district, kind.name, (start, start + length), _centre(dice, district, kind.scope))


def _centre(dice: random.Random, district: District, scope: Scope) -> str:
    if scope == "gateway":
        names = [gateway.id for gateway in district.registry.gateways]
        return WEAK_GATEWAY if dice.random() < WEAK_SHARE else dice.choice(names)
    groups = district.zones if scope == "zone" else district.buildings
    return dice.choice(groups[dice.choice(sorted(groups))])


def make(dice: random.Random, district: District, kind: str, span: tuple[int, int], centre: str) -> Cause:
    """Return a cause of a kind at a device from its start to its end (Unix ms), its strength drawn by `dice`."""
    start_ms, end_ms = span
    device = district.devices[centre]
    subjects: tuple[str, ...] = (centre,)
    strength: dict[str, float] = {}
    occupied: tuple[str, ...] = ()
    match kind:
        case "mains_burst":
            subjects = district.zones[device.zone]
            strength = _burst(dice, district, centre, subjects)
        case "low_pressure":
            strength = {"level_mpa": dice.uniform(0.08, 0.12)}
        case "knocked_over":
            strength = {
                "tilt_deg": dice.uniform(40, 90),
                "flow_lps": dice.uniform(8, 20),
                "dip_mpa": dice.uniform(0.02, 0.04),
                "flow_s": dice.uniform(300, 1500),
            }
        case "illegal_use" | "authorised_use":
            strength = {"flow_lps": dice.uniform(5, 12), "dip_mpa": dice.uniform(0.01, 0.03)}
        case "battery_low":
            strength = {"low_v": dice.uniform(2.95, 3.08)}
        case "trapped":
            occupied = (centre,)
            strength = {"code_s": dice.uniform(2, 8), "button_s": dice.uniform(20, 40)}
        case "power_cut_occupied" | "power_cut_empty":
            subjects = district.buildings[device.building]
            strength = {"button_s": dice.uniform(20, 40)}
            if kind == "power_cut_occupied":
                occupied = tuple(sorted(dice.sample(subjects, dice.randint(1, len(subjects)))))
        case "door_failure":
            strength = {"codes": dice.randint(4, 7), "over_s": dice.uniform(380, 480)}
        case _:
            pass  # gateway_offline, inspection: start and end say all
    return Cause(f"{kind}-{centre}-{start_ms}", kind, start_ms, end_ms, centre, subjects, strength, occupied)


def _burst(dice: random.Random, district: District, centre: str, members: tuple[str, ...]) -> dict[str, float]:
    """Draw how many hydrants go dry; the fall decays with distance so that just these lose 0.22 MPa or more.

    0.22 takes even the highest night pressure (0.34) below 0.14 with room for noise.
    """
    depth = dice.uniform(0.275, 0.295)
    dry = dice.randint(6, 14)
    distances = sorted(district.distance_m(centre, member) for member in members)
    return {"depth_mpa": depth, "reach_m": distances[dry - 1] / math.log(depth / 0.22)}


def demo(district: District, seed: int, origin_ms: int) -> list[Cause]:
    """Return the planted causes of a live run, at fixed times after its origin."""
    dice = random.Random(f"{seed}/demo")

    def at(kind: str, second: float, minutes: float, group: tuple[str, ...], **strength: float) -> Cause:
        start = origin_ms + round(second * SECOND_MS)
        cause = make(dice, district, kind, (start, start + round(minutes * MINUTE_MS)), dice.choice(group))
        return msgspec.structs.replace(cause, strength={**cause.strength, **strength})

    cut = at("power_cut_occupied", 120, 12, district.buildings["bld-04"])
    return [
        at("trapped", 12, 15, district.buildings["bld-01"], code_s=1.0, button_s=3.0),
        at("knocked_over", 20, 60, district.zones["zone-03"]),
        at("illegal_use", 45, 8, district.zones["zone-05"]),
        at("mains_burst", 70, 40, district.zones["zone-07"]),
        msgspec.structs.replace(cut, occupied=cut.subjects[:2]),
        at("authorised_use", 150, 8, district.zones["zone-02"]),
        at("gateway_offline", 240, 5, ("gw-05",)),
    ]


class Schedule:
    """The causes of a run, day by day from its origin, known to the devices they touch.

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
        self._until_ms = until_ms
        self._planned = 0  # blocks
        self._touching: dict[str, tuple[Cause, ...]] = {}
        self._block = cache(self._plan_block)

    def _plan_block(self, block: int) -> tuple[Cause, ...]:
        until_ms = self._until_ms
        return tuple(c for c in self._draw_block(block) if until_ms is None or c.end_ms + GAP_MS <= until_ms)

    def _draw_block(self, block: int) -> list[Cause]:
        start = self.origin_ms + block * DAY_MS
        seed = f"{self.seed}/{self.scenario}/{block}"
        if self.scenario == "random":
            return plan(self.district, seed, (start, start + DAY_MS))
        first = demo(self.district, self.seed, self.origin_ms) if block == 0 else []
        quiet = DEMO_QUIET_MS - EARLIEST_MS if block == 0 else 0
        span = start + quiet, start + DAY_MS
        return plan(self.district, seed, span, density=DEMO_DENSITY, gap_ms=DEMO_GAP_MS, planted=first)

    def causes(self, from_ms: int, to_ms: int) -> list[Cause]:
        """Return the causes that start in [from, to), in order."""
        first = max((from_ms - self.origin_ms) // DAY_MS, 0)
        last = max((to_ms - self.origin_ms) // DAY_MS, -1)
        found = [cause for block in range(first, last + 1) for cause in self._block(block)]
        return [cause for cause in found if from_ms <= cause.start_ms < to_ms]

    def advance(self, now_ms: int) -> None:
        """Let the devices know every cause around `now_ms`: what is over is forgotten, the next hour is planned."""
        blocks = (now_ms + HOUR_MS - self.origin_ms) // DAY_MS + 1
        if blocks <= self._planned:
            return
        self._planned = blocks
        around = [
            cause
            for block in range(max(blocks - 2, 0), blocks)
            for cause in self._block(block)
            if cause.end_ms > now_ms - KEEP_MS
        ]
        touching: dict[str, list[Cause]] = {}
        for cause in around:
            for device in cause.subjects:
                touching.setdefault(device, []).append(cause)
        self._touching = {device: tuple(causes) for device, causes in touching.items()}

    def touching(self, device: str) -> tuple[Cause, ...]:
        """Return the known causes that touch a device, in order of their starts."""
        return self._touching.get(device, ())

    def offline(self, gateway: str, at_ms: int) -> bool:
        """Return whether a gateway has no uplink at a time."""
        return any(
            cause.kind == "gateway_offline" and cause.start_ms <= at_ms < cause.end_ms
            for cause in self.touching(gateway)
        )
