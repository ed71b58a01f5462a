"""What a district is, whatever its size: its registry, its geometry in metres, its pipes, and who answers for what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from citybrain.model import Cell, Device, Registry

Size = Literal["zone", "reference"]
SIZES: tuple[Size, ...] = get_args(Size)
Metres = tuple[float, float]  # (east, north) of the origin
Box = tuple[float, float, float, float]  # west, south, east, north, in metres from the origin

# Invented: open water, so that no real neighbourhood is meant; the division code 99.... is assigned to nobody.
ORIGIN_LON, ORIGIN_LAT = 120.1500, 31.2000
DIVISION = "990101"
METRES_PER_DEGREE = 111_320.0
CELL_M = 100.0


class District(msgspec.Struct, frozen=True):
    """A district ready to be provisioned and simulated. `metres` are (east, north) of each device from the origin.

    zones: the hydrants of each pressure zone; its pump room, if it has one, stands in `pump_rooms`. behind: the devices
    of each gateway, without itself. pipes: of each zone, how far its hydrants are from each other along the pipes (m),
    rows and columns as in `zones`. boxes: the outline of each cell. zone_cells: the cells a zone supplies. lines: the
    centre line of each road.
    """

    seed: int
    registry: Registry
    devices: dict[str, Device]
    zones: dict[str, tuple[str, ...]]
    buildings: dict[str, tuple[str, ...]]
    floors: dict[str, int]
    cells: dict[str, Cell]
    metres: dict[str, Metres]
    behind: dict[str, tuple[str, ...]]
    pipes: dict[str, NDArray[np.float64]]
    boxes: dict[str, Box]
    zone_cells: dict[str, tuple[str, ...]]
    lines: dict[str, tuple[Metres, ...]] = {}
    pump_rooms: dict[str, str] = {}
    size: Size = "zone"

    def of_gateway(self, gateway: str) -> tuple[str, ...]:
        """Return the ids of the devices behind a gateway, without the gateway itself."""
        return self.behind.get(gateway, ())

    def distance_m(self, one: str, other: str) -> float:
        """Return how far two devices stand from each other, in metres."""
        (x1, y1), (x2, y2) = self.metres[one], self.metres[other]
        return math.hypot(x2 - x1, y2 - y1)

    def at(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Return where devices stand, in metres (east, north) from the origin: shape (n, 2)."""
        return np.array([self.metres[name] for name in names], np.float64).reshape(-1, 2)

    def pipe_row(self, hydrant: str) -> NDArray[np.float64]:
        """Return how far the hydrants of its zone are from one along the pipes, in metres, in the order of `zones`."""
        zone = self.devices[hydrant].zone
        row: NDArray[np.float64] = self.pipes[zone][self.zones[zone].index(hydrant)]
        return row

    def pipe_m(self, one: str, other: str) -> float:
        """Return how far two hydrants are from each other along the pipes, in metres; inf between two zones."""
        zone = self.devices[other].zone
        if self.devices[one].zone != zone:
            return math.inf
        return float(self.pipe_row(one)[self.zones[zone].index(other)])

    def handler(self, department: str, device: str) -> str:
        """Return the unit that does a department's work at a device.

        That is the device's own maintainer where it does this department's work, else the department's office in the
        street, else the department.
        """
        found = self.devices[device]
        street = self.cells[found.place.cell].street
        units = [unit for unit in self.registry.units if unit.department == department]
        for unit in units:
            if unit.code == found.maintainer:
                return unit.code
        return next((unit.code for unit in units if unit.street == street), department)

    def area_owner(self, street: str) -> str:
        """Return the unit that leads in a street: the street's own office, empty where there is none."""
        found = (unit.code for unit in self.registry.units if unit.street == street and not unit.department)
        return next(found, "")


def degrees(x_m: float, y_m: float, digits: int = 7) -> tuple[float, float]:
    """Return longitude and latitude (CGCS2000 degrees; 7 digits are 1 cm) of a point in metres from the origin."""
    lat = ORIGIN_LAT + y_m / METRES_PER_DEGREE
    lon = ORIGIN_LON + x_m / (METRES_PER_DEGREE * math.cos(math.radians(ORIGIN_LAT)))
    return round(lon, digits), round(lat, digits)


def grouped(devices: Sequence[Device], by: str) -> dict[str, tuple[str, ...]]:
    """Return the ids of devices by the value of a field, those without one left out."""
    groups: dict[str, list[str]] = {}
    for device in devices:
        groups.setdefault(getattr(device, by), []).append(device.id)
    return {key: tuple(members) for key, members in groups.items() if key}
