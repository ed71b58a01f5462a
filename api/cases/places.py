"""Where a case belongs: cell → responsibility grid → street → the street's own unit (块牵头、条履职)."""

from __future__ import annotations

import msgspec

from citybrain.model import Device, Place, Registry

UNPLACED = ""  # no cell, grid, street or owner: a person has to place it


class Located(msgspec.Struct, frozen=True):
    """A place with all it belongs to. `area_owner` is the unit of the street; empty fields are for a person to fill."""

    place: Place
    grid: str
    street: str
    area_owner: str

    @property
    def complete(self) -> bool:
        return bool(self.place.cell and self.grid and self.street and self.area_owner)


NOWHERE = Located(Place(0.0, 0.0, UNPLACED), UNPLACED, UNPLACED, UNPLACED)


class Atlas:
    """A registry, ready to be asked: devices by id, cells by code, units by code and street."""

    def __init__(self, registry: Registry, name: str = "") -> None:
        self.name = name
        self.devices = {device.id: device for device in registry.devices}
        self.places = {gateway.id: gateway.place for gateway in registry.gateways}
        self.places |= {device.id: device.place for device in registry.devices}
        self.cells = {cell.code: cell for cell in registry.cells}
        self.units = {unit.code: unit for unit in registry.units}
        self.owners = {unit.street: unit.code for unit in registry.units if unit.street}

    def device(self, subject: str) -> Device | None:
        """Return the device called `subject`, if it is provisioned."""
        return self.devices.get(subject)

    def locate(self, subject: str) -> Located:
        """Return where a device or gateway stands; NOWHERE, or a place with empty fields, where nobody knows."""
        place = self.places.get(subject)
        if place is None:
            return NOWHERE
        cell = self.cells.get(place.cell)
        if cell is None:
            return Located(place, UNPLACED, UNPLACED, UNPLACED)
        return Located(place, cell.grid, cell.street, self.owners.get(cell.street, UNPLACED))

    def unit_name(self, code: str) -> tuple[str, str]:
        """Return a unit's Chinese and English name, its code where it is not in the registry."""
        unit = self.units.get(code)
        return (unit.zh, unit.en) if unit else (code, code)
