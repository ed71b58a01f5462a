"""What is asked of the ledger: lists, one asset with all that belongs to it, quarantine, registers; nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Connection, select

from api.assets.areas import read_around
from api.assets.book import Asset, Book, Register, book_of
from api.assets.coordinates import parse_crs, to_cgcs2000
from api.assets.findings import Refused, finding
from api.assets.layers import DECIMALS, place_problem
from api.assets.store import read_book
from citybrain.db.schema import assets, timeline
from citybrain.errors import NotFound
from citybrain.layout import Layout
from citybrain.model import Place, Registry
from citybrain.storage import OS_FILES
from streams.quarantine import waiting
from streams.registry import decode_registry

FILTERS = ("kind", "state", "zone", "building", "gateway")


class Waiting(msgspec.Struct):
    """A sensor that nobody has provisioned: where its readings came from, since when, which metrics, how many."""

    sensor: str
    gateway: str
    shard: int
    first_at: int
    last_at: int
    readings: int
    metrics: list[str]


def registry_in_force(layout: Layout) -> Registry:
    """Return the registry in force, an empty one where there is none yet."""
    active = layout.read_active()
    if active is None or not active.registry:
        return Registry((), ())
    return decode_registry(layout.get_blob(active.registry))


def read_ledger(layout: Layout, connection: Connection | None, at_ms: int) -> Book:
    """Return the ledger; without a database that is what the registry in force says."""
    if connection is None:
        return book_of(registry_in_force(layout), at_ms)
    return read_book(connection, lambda: registry_in_force(layout), at_ms)


def listed(book: Book, asked: Mapping[str, str | None]) -> list[Asset]:
    """Return assets in the order of their codes; `asked`: values of FILTERS, and `street` and `grid` of their cells."""
    wanted = {name: value for name, value in asked.items() if value}
    return [
        asset
        for _, asset in sorted(book.assets.items())
        if all(_field(book, asset, name) == value for name, value in wanted.items())
    ]


def _field(book: Book, asset: Asset, name: str) -> str:
    if name in FILTERS:
        return str(getattr(asset, name))
    cell = book.cells.get(asset.place.cell)
    return str(getattr(cell, name)) if cell is not None else ""


def shown(book: Book, asset: Asset) -> dict[str, Any]:
    """Return an asset with its sensor, its place in the district, and what its registers say of it."""
    cell, road = book.cells.get(asset.place.cell), book.roads.get(asset.place.road)
    areas = {kind: getattr(cell, kind) if cell else "" for kind in ("grid", "workstation", "community", "street")}
    place = {
        **msgspec.structs.asdict(asset.place),
        **areas,
        "road_name": road.zh if road else "",
        "road_chief": road.chief if road else "",
    }
    facts = msgspec.to_builtins(asset)
    return {**facts, "place": place, "sensor": book.sensor_of(asset.code)}


def history(connection: Connection | None, book: Book, code: str) -> dict[str, Any]:
    """Return an asset's sensors and steps, oldest first; raises NotFound."""
    if code not in book.assets:
        raise NotFound(f"asset {code[:60]!r}: not in the ledger")
    own = [msgspec.to_builtins(one) for one in book.sensors.get(code, ())]
    return {"asset": code, "sensors": own, "steps": _steps(connection, code) if connection is not None else []}


def _steps(connection: Connection, code: str) -> list[dict[str, Any]]:
    query = (
        select(timeline)
        .join(assets, assets.c.id == timeline.c.entity_id)
        .where(timeline.c.entity == "asset", assets.c.code == code)
        .order_by(timeline.c.id)
    )
    names = ("at", "event", "before", "after", "reason", "actor")
    return [
        {**{name: row[name] for name in names}, "details": msgspec.json.decode(row["details"])}
        for row in connection.execute(query).mappings()
    ]


def registers_of(book: Book, now_ms: int, *, all_of_them: bool = False) -> list[dict[str, Any]]:
    """Return the entries of the registers, newest first; only those that are not over, unless all are asked for."""
    entries = [book.registers[n] for n in sorted(book.registers, reverse=True)]
    return [
        {**msgspec.to_builtins(entry), "phase": phase(entry, now_ms)}
        for entry in entries
        if all_of_them or phase(entry, now_ms) in ("coming", "now")
    ]


def phase(entry: Register, now_ms: int) -> str:
    """Return coming | now | over | cancelled."""
    if entry.state == "cancelled":
        return "cancelled"
    return "coming" if now_ms < entry.from_ms else "now" if now_ms < entry.until_ms else "over"


def quarantined(layout: Layout, shards: int) -> list[Waiting]:
    """Return the sensors whose readings wait for an asset, by the time of their last."""
    index = {device.wire_id: device.gateway for device in registry_in_force(layout).devices}
    found: dict[tuple[str, str], Waiting] = {}
    for shard in range(shards):
        for held in waiting(layout.quarantine / str(shard), OS_FILES):
            if index.get(held.device) == held.gateway or not held.readings:
                continue
            times = [one.observed_at for one in held.readings]
            key = (held.gateway, held.device)
            one = found.setdefault(key, Waiting(held.device, held.gateway, shard, times[0], times[0], 0, []))
            one.first_at, one.last_at = min(one.first_at, *times), max(one.last_at, *times)
            one.readings += len(times)
            one.metrics = sorted({*one.metrics, *(name for reading in held.readings for name in reading.values)})
    return sorted(found.values(), key=lambda one: (-one.last_at, one.sensor))


def place_at(book: Book, lon: float, lat: float, crs: str = "cgcs2000", address: str = "") -> Place:
    """Return a place with the cell and the road it lies at; raises UsageError, Refused for what can be no place."""
    x, y = to_cgcs2000(np.array([lon]), np.array([lat]), parse_crs(crs))
    wrong = place_problem(float(x[0]), float(y[0]))
    if wrong:
        raise Refused([finding("place", wrong, lon=lon, lat=lat)])
    found = read_around([], [], book).lookup().find(x, y)
    at = round(float(x[0]), DECIMALS), round(float(y[0]), DECIMALS)
    return Place(*at, found.cell[0], address, found.road[0])
