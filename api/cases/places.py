"""Where a case belongs: cell → responsibility grid → street → the street's own unit (块牵头、条履职)."""

from __future__ import annotations

import msgspec

from citybrain.model import Device, Place, Registry

UNPLACED = ""  # no cell, grid, street or owner: a person has to place it


class Located(msgspec.Struct, frozen=True):
    """A place with all it belongs to. `area_owner` is the unit of the street; empty fields are for a person to fill.

    A district without workstations, communities or roads leaves those empty, and the place is complete all the same.
    """

    place: Place
    grid: str
    street: str
    area_owner: str
    workstation: str = ""
    community: str = ""
    road_chief: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.place.cell and self.grid and self.street and self.area_owner)


NOWHERE = Located(Place(0.0, 0.0, UNPLACED), UNPLACED, UNPLACED, UNPLACED)


class Atlas:
    """A registry, ready to be asked: devices by id, cells by code, units by code and street."""

    def __init__(self, registry: Registry, name: str = "") -> None:
        self.name = name
        self.registry = registry
        self.devices = {device.id: device for device in registry.devices}
        self.places = {gateway.id: gateway.place for gateway in registry.gateways}
        self.places |= {device.id: device.place for device in registry.devices}
        self.cells = {cell.code: cell for cell in registry.cells}
        self.units = {unit.code: unit for unit in registry.units}
        self.roads = {road.code: road for road in registry.roads}
        self.owners = {unit.street: unit.code for unit in registry.units if unit.street and not unit.department}
        self.stationed = {
            (unit.department, unit.street): unit.code
            for unit in registry.units
            if unit.street and unit.department
        }  # fmt: skip

    def device(self, subject: str) -> Device | None:
        """Return the device called `subject`, if it is provisioned."""
        return self.devices.get(subject)

    def on_trial(self, subject: str) -> bool:
        """Return whether a device is being commissioned: its alarms show and become no case."""
        device = self.devices.get(subject)
        return device is not None and device.mode == "commissioning"

    def locate(self, subject: str) -> Located:
        """Return where a device or gateway stands; NOWHERE, or a place with empty fields, where nobody knows."""
        place = self.places.get(subject)
        if place is None:
            return NOWHERE
        cell, road = self.cells.get(place.cell), self.roads.get(place.road)
        chief = road.chief if road is not None else ""
        if cell is None:
            return Located(place, UNPLACED, UNPLACED, UNPLACED, road_chief=chief)
        owner = self.owners.get(cell.street, UNPLACED)
        return Located(place, cell.grid, cell.street, owner, cell.workstation, cell.community, chief)

    def handler(self, department: str, subject: str) -> str:
        """Return the unit that does a department's work at a device.

        In this order: the asset's own maintainer where that does this department's work, the department's office
        stationed in the street (派驻机构), the department itself.
        """
        device = self.devices.get(subject)
        maintainer = self.units.get(device.maintainer) if device is not None and device.maintainer else None
        if maintainer is not None and department in (maintainer.department, maintainer.code):
            return maintainer.code
        return self.stationed.get((department, self.locate(subject).street), department)

    def unit_name(self, code: str) -> tuple[str, str]:
        """Return a unit's Chinese and English name, its code where it is not in the registry."""
        unit = self.units.get(code)
        return (unit.zh, unit.en) if unit else (code, code)
