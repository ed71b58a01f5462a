"""The virtual district: what stands where, who answers for it, and through which gateway it speaks.

`build(seed)` is the small one of a demo, made here: ten pressure zones of 20 hydrants lie in two streets, five one
below the other in each; a zone fills one responsibility grid of about 1.1 km by 0.3 km; six buildings hold 20 lifts.
`build(seed, "reference")` has the size and structure of a real district (simulators/world/). Everything is invented and
follows from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from citybrain.model import Cell, Device, Gateway, Place, Registry, Unit
from simulators.noise import Noise
from simulators.world.city import CELL_M, DIVISION, SIZES, Box, District, Metres, Size, degrees, grouped
from simulators.world.reference import build_reference

__all__ = ["DIVISION", "SIZES", "District", "Size", "build"]

STREETS = ("001", "002")
STREET_NAMES = {"001": ("甲浦街道", "Jiapu Street"), "002": ("乙浦街道", "Yipu Street")}
ROADS = ("青禾路", "望潮路", "白鹭路", "长堤路", "云栈路", "松涛路", "芦苇路", "石桥路", "星河路", "晴川路")

CELLS_ACROSS, CELLS_DOWN = 11, 3
GRID_WIDTH_M, GRID_HEIGHT_M = CELLS_ACROSS * CELL_M, CELLS_DOWN * CELL_M
ZONES = 10
ZONES_A_STREET = ZONES // len(STREETS)
HYDRANTS_A_ROW = 10
LIFTS_IN_BUILDING = (4, 4, 3, 3, 3, 3)
FLOORS_IN_BUILDING = (18, 24, 12, 28, 16, 9)
ZONE_OF_BUILDING = (1, 2, 3, 5, 7, 9)
GATEWAYS = 5
ZONES_A_GATEWAY = ZONES // GATEWAYS

HYDRANT_METRICS = ("pressure_mpa", "flow_lps", "battery_v")
HYDRANT_EVENTS = ("tilt_deg", "cap_open")
LIFT_METRICS = ("floor", "moving", "vibration_rms_g", "current_a")
LIFT_EVENTS = ("occupied", "door_closed", "service_mode", "fault_code")
GATEWAY_METRICS = ("uptime_s", "spooled")

UNITS = (
    Unit("water", "供水公司", "Water company"),
    Unit("fire", "消防救援", "Fire and rescue"),
    Unit("lift-maintenance", "电梯维保单位", "Elevator maintainer"),
    Unit("lift-rescue", "96333电梯应急", "Elevator emergency line"),
    Unit("sensor-ops", "物联设备运维", "Sensor maintenance"),
)


def zone_corner(zone: int) -> tuple[float, float]:
    """Return the south-west corner of zone 1..10 in metres from the origin; a street's zones are stacked."""
    street, row = divmod(zone - 1, ZONES_A_STREET)
    return street * (GRID_WIDTH_M + CELL_M), -(row + 1) * GRID_HEIGHT_M


def cell_code(zone: int, x_m: float, y_m: float) -> str:
    """Return the 15-digit code (division 6, street 3, community 3, sequence 3) of the cell of a point in a zone.

    The sequence runs west to east, north to south.
    """
    left, bottom = zone_corner(zone)
    column = min(max(int((x_m - left) // CELL_M), 0), CELLS_ACROSS - 1)
    row = min(max(int((bottom + GRID_HEIGHT_M - y_m) // CELL_M), 0), CELLS_DOWN - 1)
    street, community = divmod(zone - 1, ZONES_A_STREET)
    return f"{DIVISION}{STREETS[street]}{community + 1:03d}{row * CELLS_ACROSS + column + 1:03d}"


def grid_of(zone: int) -> str:
    """Return the responsibility grid that zone 1..10 fills."""
    street, community = divmod(zone - 1, ZONES_A_STREET)
    return f"{DIVISION}{STREETS[street]}-G{community + 1:02d}"


def _cells() -> tuple[Cell, ...]:
    found = []
    for zone in range(1, ZONES + 1):
        left, bottom = zone_corner(zone)
        street = STREETS[(zone - 1) // ZONES_A_STREET]
        for row in range(CELLS_DOWN):
            for column in range(CELLS_ACROSS):
                centre = left + (column + 0.5) * CELL_M, bottom + GRID_HEIGHT_M - (row + 0.5) * CELL_M
                found.append(Cell(cell_code(zone, *centre), grid_of(zone), street))
    return tuple(found)


def _place(zone: int, x_m: float, y_m: float, address: str) -> Place:
    lon, lat = degrees(x_m, y_m, digits=6)
    return Place(lon, lat, cell_code(zone, x_m, y_m), address)


def _gateway_of(zone: int) -> str:
    return f"gw-{(zone - 1) // ZONES_A_GATEWAY + 1:02d}"


def _hydrants(noise: Noise) -> list[tuple[Device, tuple[float, float]]]:
    """Twenty a zone, ten along each side of its road, about 105 m apart."""
    found = []
    for zone in range(1, ZONES + 1):
        left, bottom = zone_corner(zone)
        for place in range(2 * HYDRANTS_A_ROW):
            number = (zone - 1) * 2 * HYDRANTS_A_ROW + place + 1
            side, along = divmod(place, HYDRANTS_A_ROW)
            x = left + 60.0 + along * 105.0 + 20.0 * (noise.uniform(2 * number) - 0.5)
            y = bottom + 80.0 + side * 130.0 + 20.0 * (noise.uniform(2 * number + 1) - 0.5)
            house = 10 * along + 2 + side
            device = Device(
                f"hyd-{number:06d}",
                "hydrant",
                _gateway_of(zone),
                _place(zone, x, y, f"{ROADS[zone - 1]}{house}号"),
                HYDRANT_METRICS,
                HYDRANT_EVENTS,
                zone=f"zone-{zone:02d}",
                name=f"消火栓{number:03d}",
                tags=("mains", "wet_barrel"),
            )
            found.append((device, (x, y)))
    return found


def _lifts(noise: Noise) -> list[tuple[Device, tuple[float, float]]]:
    found: list[tuple[Device, tuple[float, float]]] = []
    for index, lifts in enumerate(LIFTS_IN_BUILDING):
        zone = ZONE_OF_BUILDING[index]
        left, bottom = zone_corner(zone)
        x = left + 150.0 + 800.0 * noise.uniform(100_000 + index)
        y = bottom + 145.0 + 10.0 * noise.uniform(200_000 + index)
        for lift in range(lifts):
            number = len(found) + 1
            device = Device(
                f"lift-{number:04d}",
                "elevator",
                _gateway_of(zone),
                _place(zone, x, y, f"{ROADS[zone - 1]}{100 + index}号 {lift + 1}号梯"),
                LIFT_METRICS,
                LIFT_EVENTS,
                building=f"bld-{index + 1:02d}",
                name=f"{ROADS[zone - 1]}{100 + index}号{lift + 1}号梯",
                tags=("controller",),
            )
            found.append((device, (x, y)))
    return found


def _gateways() -> list[tuple[Gateway, Device, tuple[float, float]]]:
    found = []
    for number in range(1, GATEWAYS + 1):
        zone = (number - 1) * ZONES_A_GATEWAY + 1
        left, bottom = zone_corner(zone)
        x, y = left + 50.0, bottom + 150.0
        name = f"gw-{number:02d}"
        place = _place(zone, x, y, f"{ROADS[zone - 1]}1号机柜")
        device = Device(name, "gateway", name, place, GATEWAY_METRICS, name=f"网关{number:02d}")
        found.append((Gateway(name, (number - 1) % 2, place), device, (x, y)))
    return found


def _boxes() -> dict[str, Box]:
    found: dict[str, Box] = {}
    for zone in range(1, ZONES + 1):
        left, bottom = zone_corner(zone)
        for row in range(CELLS_DOWN):
            for column in range(CELLS_ACROSS):
                west, south = left + column * CELL_M, bottom + row * CELL_M
                code = cell_code(zone, west + CELL_M / 2, south + CELL_M / 2)
                found[code] = (west, south, west + CELL_M, south + CELL_M)
    return found


def _pipe_distances(members: tuple[str, ...], metres: Mapping[str, Metres]) -> NDArray[np.float64]:
    """Return how far hydrants are along pipes that run west-east and north-south only, in metres."""
    at = np.array([metres[name] for name in members])
    ways: NDArray[np.float64] = np.abs(at[:, None] - at[None]).sum(axis=2)
    return ways


def build(seed: int, size: Size = "zone") -> District:
    """Return the district of a seed.

    Size `zone` has 200 hydrants, 20 elevators, 5 gateways in 2 shards, 330 cells, 10 grids; `reference` has 2,000
    hydrants, 600 elevators, 400 cameras, 48 pump rooms, 64 gateways in 4 shards, 3,600 cells, 85 grids.
    """
    return build_reference(seed) if size == "reference" else _build_zone(seed)


def _build_zone(seed: int) -> District:
    noise = Noise(seed, "district")
    placed = [*_hydrants(noise), *_lifts(noise)]
    boxes = _gateways()
    devices = [device for device, _ in placed] + [device for _, device, _ in boxes]
    areas = tuple(Unit(f"street-{code}", zh, en, code) for code, (zh, en) in STREET_NAMES.items())
    cells = _cells()
    zones = grouped(devices, "zone")
    metres = {device.id: at for device, at in placed} | {device.id: at for _, device, at in boxes}
    zone_of = {grid_of(zone): f"zone-{zone:02d}" for zone in range(1, ZONES + 1)}
    return District(
        seed,
        Registry(tuple(gateway for gateway, _, _ in boxes), tuple(devices), cells, UNITS + areas),
        {device.id: device for device in devices},
        zones,
        grouped(devices, "building"),
        {f"bld-{index + 1:02d}": floors for index, floors in enumerate(FLOORS_IN_BUILDING)},
        {cell.code: cell for cell in cells},
        metres,
        behind=grouped([device for device, _ in placed], "gateway"),
        pipes={zone: _pipe_distances(members, metres) for zone, members in zones.items()},
        boxes=_boxes(),
        zone_cells={zone: tuple(cell.code for cell in cells if zone_of[cell.grid] == zone) for zone in zones},
    )
