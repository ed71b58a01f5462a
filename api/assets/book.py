"""The ledger as a value: what stands where, which sensor it carries, who answers for it; and what follows from that.

An *asset* is what has alarms. A *sensor* is what the wire names; an asset has one at a time, and a history of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from citybrain.machine import Machine, Step
from citybrain.model import Area, Cell, Device, Gateway, Place, Registry, Road, Unit

STATES = ("planned", "commissioning", "active", "retired")
IN_SERVICE = frozenset({"commissioning", "active"})

ASSET = Machine(
    "asset",
    "new",
    (
        Step("new", "plan", "planned", "entered_before_it_stands"),
        Step("new", "commission", "commissioning", "put_on_trial"),
        Step("new", "activate", "active", "put_in_service"),
        Step("planned", "commission", "commissioning", "put_on_trial"),
        Step("planned", "activate", "active", "put_in_service"),
        Step("commissioning", "activate", "active", "trial_passed"),
        Step("active", "commission", "commissioning", "back_on_trial"),
        *(Step(state, "retire", "retired", "taken_out_of_service") for state in STATES[:-1]),
        *(Step(state, "replace", state, "another_sensor") for state in STATES[:-1]),
        *(Step(state, "edit", state, "entry_changed") for state in STATES[:-1]),
    ),
)
TO_STATE = {"planned": "plan", "commissioning": "commission", "active": "activate", "retired": "retire"}

REGISTER = Machine(
    "register",
    "new",
    (Step("new", "enter", "entered", "entered"), Step("entered", "cancel", "cancelled", "taken_back")),
)


class Asset(msgspec.Struct, frozen=True):
    """One asset. since, until: in service from, to (Unix ms). nominal: usual values by metric, as its sheet gave."""

    code: str
    kind: str
    state: Literal["planned", "commissioning", "active", "retired"]
    place: Place
    gateway: str = ""
    metrics: tuple[str, ...] = ()
    event_metrics: tuple[str, ...] = ()
    zone: str = ""
    building: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    maintainer: str = ""
    nominal: dict[str, float] = {}
    since: int = 0
    until: int | None = None


class Sensor(msgspec.Struct, frozen=True):
    """A sensor (`id`: its wire name) on an asset, from installed_at until removed_at (Unix ms; None: it is there)."""

    id: str
    asset: str
    installed_at: int
    removed_at: int | None = None
    reason: str = ""


class Shape(msgspec.Struct, frozen=True):
    """Where an area, cell, zone or road lies: GeoJSON geometry (CGCS2000 degrees) as text."""

    kind: str
    code: str
    geometry: str


class Zone(msgspec.Struct, frozen=True):
    """A pressure zone of the water network."""

    code: str
    zh: str = ""
    en: str = ""


class Register(msgspec.Struct, frozen=True):
    """An entry of a register: rules that say nothing about `subject` in [from_ms, until_ms), on whose word, and why.

    kind: `use` (authorised use of a hydrant) or `maintenance`. subject: an asset's code, or `grid:CODE`, `zone:CODE`,
    `building:CODE`, `street:CODE`. rules: those it silences.
    """

    n: int
    kind: Literal["use", "maintenance"]
    subject: str
    rules: tuple[str, ...]
    from_ms: int
    until_ms: int
    actor: str
    reason: str
    entered_at: int
    state: Literal["entered", "cancelled"] = "entered"
    cancelled_by: str = ""


class Book(msgspec.Struct, frozen=True):
    """The whole ledger at one version. Areas and shapes are keyed `kind:code`, registers by number, others by code."""

    version: int = 0
    assets: Mapping[str, Asset] = {}
    sensors: Mapping[str, tuple[Sensor, ...]] = {}  # by asset, oldest first
    gateways: Mapping[str, Gateway] = {}
    units: Mapping[str, Unit] = {}
    areas: Mapping[str, Area] = {}
    zones: Mapping[str, Zone] = {}
    cells: Mapping[str, Cell] = {}
    roads: Mapping[str, Road] = {}
    shapes: Mapping[str, Shape] = {}
    registers: Mapping[int, Register] = {}

    def sensor_of(self, asset: str) -> str:
        """Return the wire name of the sensor an asset carries now, "" where it has none."""
        own = self.sensors.get(asset, ())
        return own[-1].id if own and own[-1].removed_at is None else ""

    def carrier_of(self, sensor: str) -> str:
        """Return the asset in use that carries a sensor now, "" where none does."""
        for asset in self.sensors:
            if self.sensor_of(asset) == sensor:
                return asset
        return ""


def registry_of(book: Book) -> Registry:
    """Return what is provisioned: assets in service with their present sensors, and everything around them."""
    devices = tuple(
        Device(
            asset.code,
            asset.kind,
            asset.gateway,
            asset.place,
            asset.metrics,
            asset.event_metrics,
            asset.zone,
            asset.building,
            asset.name,
            asset.tags,
            sensor="" if (sensor := book.sensor_of(asset.code)) == asset.code else sensor,
            mode="commissioning" if asset.state == "commissioning" else "active",
            maintainer=asset.maintainer,
        )
        for asset in _ordered(book.assets)
        if asset.state in IN_SERVICE and book.sensor_of(asset.code)
    )
    return Registry(
        _ordered(book.gateways),
        devices,
        _ordered(book.cells),
        _ordered(book.units),
        _ordered(book.areas),
        _ordered(book.roads),
    )


def _ordered(things: Mapping[str, msgspec.Struct]) -> tuple[Any, ...]:
    return tuple(things[key] for key in sorted(things))


def book_of(registry: Registry, at_ms: int) -> Book:
    """Return the ledger of a registry that came without one, so that it can be gone on with; its version is 0."""
    devices = registry.devices
    zones = sorted({device.zone for device in devices if device.zone})
    return Book(
        assets={
            d.id: Asset(
                d.id,
                d.kind,
                d.mode,
                d.place,
                d.gateway,
                d.metrics,
                d.event_metrics,
                d.zone,
                d.building,
                d.name,
                d.tags,
                d.maintainer,
                since=at_ms,
            )
            for d in devices
        },
        sensors={d.id: (Sensor(d.wire_id, d.id, at_ms, reason="taken over"),) for d in devices},
        gateways={gateway.id: gateway for gateway in registry.gateways},
        units={unit.code: unit for unit in registry.units},
        areas={f"{area.kind}:{area.code}": area for area in registry.areas},
        zones={code: Zone(code) for code in zones},
        cells={cell.code: cell for cell in registry.cells},
        roads={road.code: road for road in registry.roads},
    )
