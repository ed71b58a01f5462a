"""What stands in the reference district: hydrants, elevators, cameras and pump rooms, beside its roads.

Metrics and tags are those of docs/faults.md. Where a share or a distance names no source it is [U] our choice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import msgspec

from citybrain.model import Cell, Device, Place
from simulators.world.areas import node_of
from simulators.world.city import Metres, degrees
from simulators.world.mains import SHARDS, ZONES, ZONES_A_SHARD, zone_name
from simulators.world.organisation import contractors
from simulators.world.partition import Node
from simulators.world.roads import END_M, Line, Spot, anywhere, spots

HYDRANTS, MAINS_HYDRANTS, DRY_BARRELS = 2000, 100, 160
BUILDINGS, LIFTS, LIFTS_A_BUILDING, RETROFIT_SHARE = 160, 600, (2, 8), 0.15
CAMERAS = {"road": 160, "fire_lane": 120, "market": 80, "square": 40}  # by what they look at; also their tag

HYDRANT_EVENTS = ("tilt_deg", "cap_open", "impact_g", "hammer_mpa")
BATTERY_METRICS = ("pressure_mpa", "battery_v", "temperature_c", "water_present", "rssi_dbm")
MAINS_METRICS = ("pressure_mpa", "flow_lps", "battery_v", "temperature_c")
CONTROLLER_METRICS = ("floor", "moving", "vibration_rms_g", "current_a", "temperature_c")
CONTROLLER_EVENTS = ("occupied", "door_closed", "service_mode", "fault_code")
RETROFIT_METRICS = ("floor", "moving", "vibration_rms_g", "temperature_c")
RETROFIT_EVENTS = ("occupied", "door_closed")
CAMERA_METRICS = ("signal", "frame_rate_fps", "brightness", "sharpness", "view_shift", "motion")
CAMERA_EVENTS = ("garbage_s", "stall_s", "lane_blocked_s", "crowd")
PUMP_METRICS = ("pressure_mpa", "flow_lps", "current_a", "vibration_rms_g", "level_m")

# Hydrants stand at most 120 m apart (GB 50974-2014 7.2 [U]); crossings take some places away.
HYDRANT_STEP_M, HYDRANT_ASIDE_M, HYDRANT_GAP_M = 85.0, 6.0, 40.0
# How often a battery hydrant reports: 1-24 h [M]; the shares are ours.
REPORTS = {"report_1h": 0.15, "report_4h": 0.30, "report_12h": 0.30, "report_24h": 0.25}
CANDIDATES = 8000
CAMERA_SPOTS = {  # metres beside the road, name in Chinese
    "road": (5.0, "道路摄像机"),
    "fire_lane": (30.0, "消防通道摄像机"),
    "market": (18.0, "集市摄像机"),
    "square": (25.0, "广场摄像机"),
}


class Land(msgspec.Struct, frozen=True):
    """What assets are placed on: the cells by lattice place, the zone of each cell (0..47), the roads."""

    cells: dict[Node, Cell]
    zone_of: dict[Node, int]
    lines: list[Line]

    def zone(self, spot: Spot) -> int:
        """Return the zone (0..47) that supplies a spot."""
        return self.zone_of[node_of(spot.at)]

    def address(self, spot: Spot) -> str:
        """Return road and house number."""
        return f"{self.lines[spot.line].road.zh}{spot.house}号"

    def place(self, spot: Spot, suffix: str = "") -> Place:
        """Return a spot as the registry names it."""
        lon, lat = degrees(*spot.at, digits=6)
        road = self.lines[spot.line].road.code
        return Place(lon, lat, self.cells[node_of(spot.at)].code, self.address(spot) + suffix, road)


class Asset(msgspec.Struct, frozen=True):
    """A device that has no gateway yet, where it stands, and the zone (0..47) it stands in."""

    device: Device
    spot: Spot
    zone: int


def share_of(zone: int, total: int) -> int:
    """Return how many of `total` things a zone gets when each shard gets the same number of them."""
    base, extra = divmod(total // SHARDS, ZONES_A_SHARD)
    return base + (zone % ZONES_A_SHARD < extra)


def apart(found: Sequence[Spot], gap_m: float) -> list[Spot]:
    """Return the spots that are at least `gap_m` from each one before them that is returned."""
    kept: dict[tuple[int, int], list[Metres]] = {}
    result = []
    for spot in found:
        x, y = spot.at
        column, row = int(x // gap_m), int(y // gap_m)
        near = chain.from_iterable(kept.get((column + i, row + j), ()) for i in (-1, 0, 1) for j in (-1, 0, 1))
        if all((x - u) ** 2 + (y - v) ** 2 >= gap_m**2 for u, v in near):
            kept.setdefault((column, row), []).append(spot.at)
            result.append(spot)
    return result


def spread(dice: random.Random, land: Land, total: int, aside_m: float, gap_m: float) -> list[Spot]:
    """Return spots beside roads, each zone with its share of `total`, in the order of the zones.

    The nearest road is the one whose address a spot has. Raises ValueError where a zone has too little room.
    """
    candidates = anywhere(dice, land.lines, CANDIDATES, aside_m)
    usable = apart([spot for spot in candidates if spot.clear_m > aside_m + 15.0], gap_m)
    found: list[Spot] = []
    taken: Counter[int] = Counter()
    for spot in usable:
        zone = land.zone(spot)
        if taken[zone] < share_of(zone, total):
            taken[zone] += 1
            found.append(spot)
    if len(found) < total:
        raise ValueError(f"room for only {len(found)} of {total} things {aside_m:g} m beside a road")
    return sorted(found, key=land.zone)


def hydrants(dice: random.Random, land: Land) -> list[Asset]:
    """Return the hydrants: most with a battery, some on mains power, some empty at rest."""
    found = _hydrant_spots(dice, land)
    wired = _wired(dice, land, found)
    dry = set(dice.sample(range(HYDRANTS), DRY_BARRELS))
    sensors = _sensor_numbers(dice, HYDRANTS)
    reports = dice.choices(list(REPORTS), list(REPORTS.values()), k=HYDRANTS)
    keepers = contractors("sensor-ops")
    assets = []
    for index, spot in enumerate(found):
        zone = land.zone(spot)
        barrel = "dry_barrel" if index in dry else "wet_barrel"
        device = Device(
            f"hyd-{index + 1:06d}",
            "hydrant",
            "",
            land.place(spot),
            MAINS_METRICS if index in wired else BATTERY_METRICS,
            HYDRANT_EVENTS,
            zone=zone_name(zone),
            name=f"消火栓{index + 1:04d}",
            tags=("mains", barrel) if index in wired else ("battery", barrel, reports[index]),
            sensor="" if index in wired else sensors[index],
            maintainer=keepers[zone % len(keepers)].code,
        )
        assets.append(Asset(device, spot, zone))
    return assets


def _hydrant_spots(dice: random.Random, land: Land) -> list[Spot]:
    places = []
    for index, line in enumerate(land.lines):
        along, side = line.start + END_M + dice.uniform(0.0, HYDRANT_STEP_M), 1
        while along < line.end - END_M:
            places.append((index, along, side * HYDRANT_ASIDE_M))
            along, side = along + HYDRANT_STEP_M + dice.uniform(-10.0, 10.0), -side
    free = apart([spot for spot in spots(land.lines, places) if spot.clear_m > 20.0], HYDRANT_GAP_M)
    if len(free) < HYDRANTS:
        raise ValueError(f"room for only {len(free)} of {HYDRANTS} hydrants")
    return sorted(dice.sample(free, HYDRANTS), key=lambda spot: (land.zone(spot), spot.line, spot.along))


def _wired(dice: random.Random, land: Land, found: Sequence[Spot]) -> set[int]:
    """Choose the hydrants that have mains power: the same number in each shard, and nearly so in each zone."""
    members: list[list[int]] = [[] for _ in range(ZONES)]
    for index, spot in enumerate(found):
        members[land.zone(spot)].append(index)
    return {
        index for zone, inside in enumerate(members) for index in dice.sample(inside, share_of(zone, MAINS_HYDRANTS))
    }


def _sensor_numbers(dice: random.Random, count: int) -> list[str]:
    """Return 15 digits each like an IMEI: 14 and a check digit (Luhn, ISO/IEC 7812-1); 9901… is given to nobody."""
    found = []
    for serial in dice.sample(range(10**10), count):
        digits = f"9901{serial:010d}"
        doubled = (int(digit) * (1 + index % 2) for index, digit in enumerate(digits))
        found.append(f"{digits}{-sum(number // 10 + number % 10 for number in doubled) % 10}")
    return found


def elevators(dice: random.Random, land: Land) -> tuple[list[Asset], dict[str, int]]:
    """Return the elevators, building by building, and how many floors each building has."""
    found = spread(dice, land, BUILDINGS, aside_m=35.0, gap_m=70.0)
    counts = _lift_counts(dice)
    old = _old_buildings(dice, counts)
    keepers = contractors("lift-maintenance")
    floors: dict[str, int] = {}
    assets: list[Asset] = []
    for index, spot in enumerate(found):
        building = f"bld-{index + 1:03d}"
        floors[building] = dice.randint(6, 11) if index in old else dice.randint(9, 33)
        keeper = dice.choice(keepers).code
        for lift in range(1, counts[index] + 1):
            device = Device(
                f"lift-{len(assets) + 1:04d}",
                "elevator",
                "",
                land.place(spot, f" {lift}号梯"),
                RETROFIT_METRICS if index in old else CONTROLLER_METRICS,
                RETROFIT_EVENTS if index in old else CONTROLLER_EVENTS,
                building=building,
                name=f"{land.address(spot)}{lift}号梯",
                tags=("retrofit",) if index in old else ("controller",),
                maintainer=keeper,
            )
            assets.append(Asset(device, spot, land.zone(spot)))
    return assets, floors


def _lift_counts(dice: random.Random) -> list[int]:
    least, most = LIFTS_A_BUILDING
    counts = [least] * BUILDINGS
    while sum(counts) < LIFTS:
        index = dice.randrange(BUILDINGS)
        counts[index] += counts[index] < most
    return counts


def _old_buildings(dice: random.Random, counts: Sequence[int]) -> set[int]:
    """Choose the buildings whose elevators expose no controller and were fitted with a kit."""
    old: set[int] = set()
    for index in dice.sample(range(BUILDINGS), BUILDINGS):
        if sum(counts[each] for each in old) < RETROFIT_SHARE * LIFTS:
            old.add(index)
    return old


def cameras(dice: random.Random, land: Land) -> list[Asset]:
    """Return the cameras; their tag says what they look at."""
    keepers = contractors("camera-ops")
    assets: list[Asset] = []
    for tag, count in CAMERAS.items():
        aside_m, zh = CAMERA_SPOTS[tag]
        for spot in spread(dice, land, count, aside_m, gap_m=40.0):
            device = Device(
                f"cam-{len(assets) + 1:04d}",
                "camera",
                "",
                land.place(spot),
                CAMERA_METRICS,
                CAMERA_EVENTS,
                name=f"{land.address(spot)}{zh}",
                tags=(tag,),
                maintainer=dice.choice(keepers).code,
            )
            assets.append(Asset(device, spot, land.zone(spot)))
    return assets


def pump_rooms(dice: random.Random, land: Land) -> list[Asset]:
    """Return one pump room a zone."""
    found = spread(dice, land, ZONES, aside_m=45.0, gap_m=50.0)
    return [
        Asset(
            Device(
                f"pump-{zone + 1:03d}",
                "pump_room",
                "",
                land.place(spot),
                PUMP_METRICS,
                zone=zone_name(zone),
                name=f"{land.address(spot)}泵房",
            ),
            spot,
            zone,
        )
        for zone, spot in enumerate(found)
    ]
