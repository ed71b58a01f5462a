"""The ledger in the desk's database: read whole into a `Book`, written by rows. Only the desk writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Table, inspect, or_, select

from api.assets import book as books
from api.assets.book import Asset, Book, Register, Sensor, book_of
from api.assets.changes import TABLES, Changes, key_of
from api.ledger import Ledger, text
from citybrain.db.schema import assets, meta, organisation, registers, sensors
from citybrain.db.store import exists, open_store, reading, upsert
from citybrain.layout import Layout
from citybrain.model import Area, Cell, Gateway, Registry, Road, Unit

VERSION = "book"  # the key of the ledger's version in `meta`
PLAIN = ("kind", "subject", "from_ms", "until_ms", "actor", "reason", "entered_at", "state", "cancelled_by")
AROUND: dict[str, type[msgspec.Struct]] = {
    "gateways": Gateway,
    "units": Unit,
    "areas": Area,
    "zones": books.Zone,
    "cells": Cell,
    "roads": Road,
    "shapes": books.Shape,
}


def version_of(connection: Connection) -> int:
    """Return the ledger's version, 0 where there is none yet."""
    value = connection.execute(select(meta.c.value).where(meta.c.key == VERSION)).scalar()
    return int(value) if value is not None else 0


def ledger_version(layout: Layout) -> int:
    """Return the ledger's version, 0 where nothing was ever entered or there is no database."""
    if not exists(layout.place):
        return 0
    store = open_store(layout.place, readonly=True)
    try:
        with reading(store) as connection:
            return version_of(connection) if inspect(connection).has_table(meta.name) else 0
    finally:
        store.dispose()


def read_book(connection: Connection, registry: Callable[[], Registry], at_ms: int) -> Book:
    """Return the ledger; before its first change that is what the registry in force says."""
    version = version_of(connection)
    entries = {row.id: _register(row._asdict()) for row in connection.execute(select(registers))}
    if not version:
        return msgspec.structs.replace(book_of(registry(), at_ms), registers=entries)
    around: dict[str, dict[str, Any]] = {kind: {} for kind in AROUND}
    decoders = {kind: msgspec.json.Decoder(struct) for kind, struct in AROUND.items()}
    for kind, key, body in connection.execute(select(organisation.c.kind, organisation.c.key, organisation.c.body)):
        around[kind][key] = decoders[kind].decode(body)
    asset = msgspec.json.Decoder(Asset)
    rows = connection.execute(select(assets.c.code, assets.c.body))
    return Book(
        version,
        {code: asset.decode(body) for code, body in rows},
        _read_sensors(connection),
        registers=entries,
        **around,
    )


def read_behind(connection: Connection, registry: Callable[[], Registry], gateway: str, at_ms: int) -> Book:
    """Return the part of the ledger that is about one gateway: itself, the assets behind it, and their sensors.

    A fleet that enrols asks for it once a box; the whole of a city's ledger would take that long each time.
    """
    if not version_of(connection):
        known = registry()
        gateways = tuple(one for one in known.gateways if one.id == gateway)
        behind = tuple(one for one in known.devices if gateway in (one.gateway, one.id))
        return book_of(Registry(gateways, behind), at_ms)
    entry = (organisation.c.kind == "gateways", organisation.c.key == gateway)
    body = connection.execute(select(organisation.c.body).where(*entry)).scalar()
    mine = or_(assets.c.gateway == gateway, assets.c.code == gateway)
    rows = connection.execute(select(assets.c.code, assets.c.body).where(mine))
    return Book(
        version_of(connection),
        {code: msgspec.json.decode(text_, type=Asset) for code, text_ in rows},
        _read_sensors(connection, sensors.c.asset.in_(select(assets.c.code).where(mine))),
        gateways={} if body is None else {gateway: msgspec.json.decode(body, type=Gateway)},
    )


def _read_sensors(connection: Connection, *where: ColumnElement[bool]) -> dict[str, tuple[Sensor, ...]]:
    found: dict[str, list[Sensor]] = {}
    order = (sensors.c.asset, sensors.c.installed_at, sensors.c.removed_at.is_(None), sensors.c.id)
    for row in connection.execute(select(sensors).where(*where).order_by(*order)).mappings():
        one = Sensor(row["sensor"], row["asset"], row["installed_at"], row["removed_at"], row["reason"])
        found.setdefault(row["asset"], []).append(one)
    return {asset: tuple(own) for asset, own in found.items()}


def _register(row: Mapping[str, Any]) -> Register:
    rules = msgspec.json.decode(row["rules"], type=tuple[str, ...])
    return Register(row["id"], rules=rules, **{name: row[name] for name in PLAIN})


class Shelf:
    """The desk's copy of the ledger, read once and kept while nothing fails. `shards`: those gateways may belong to."""

    def __init__(self, shards: Iterable[int]) -> None:
        self.shards = tuple(shards)
        self._book: Book | None = None

    def book(self, connection: Connection, registry: Registry, at_ms: int) -> Book:
        """Return the ledger as it stands in this transaction."""
        if self._book is None or not self._book.version:
            self._book = read_book(connection, lambda: registry, at_ms)
        return self._book

    def forget(self) -> None:
        """Read it anew: a transaction failed."""
        self._book = None

    def write(self, ledger: Ledger, changes: Changes, after: Book) -> None:
        """Write a checked change set. The first one writes all there is: the registry it took over, too."""
        whole = not changes.base
        rows = {name: list(getattr(after, name).values()) if whole else getattr(changes, name) for name in TABLES}
        if whole:
            rows["sensors"] = [one for own in after.sensors.values() for one in own]
        self._assets(ledger, rows["assets"], changes, after)
        _put(ledger, sensors, [_sensor_row(one) for one in rows["sensors"]], ("asset", "sensor", "installed_at"))
        around = [
            {"kind": kind, "key": key_of(row), "body": text(row)} for kind in AROUND for row in rows[kind]
        ]  # fmt: skip
        _put(ledger, organisation, around, ("kind", "key"))
        self._kept(ledger, after)

    def _assets(self, ledger: Ledger, rows: Iterable[Asset], changes: Changes, after: Book) -> None:
        changed = {row.code: row for row in rows}
        for one in changes.sensors:
            changed.setdefault(one.asset, after.assets[one.asset])
        _put(ledger, assets, [_asset_row(row, after) for row in changed.values()], ("code",))

    def enter(self, ledger: Ledger, before: Book, entry: Register) -> None:
        """Write an entry of a register, new or changed; the ledger's version stays: nothing else depends on it."""
        row = {name: getattr(entry, name) for name in PLAIN}
        _put(ledger, registers, [{**row, "id": entry.n, "rules": text(entry.rules)}], ("id",))
        self._book = msgspec.structs.replace(before, registers={**before.registers, entry.n: entry})

    def _kept(self, ledger: Ledger, after: Book) -> None:
        ledger.keep(VERSION, str(after.version))
        self._book = after


def _put(ledger: Ledger, table: Table, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Insert rows, or change those that are there by their keys."""
    if not rows:
        return
    ledger.connection.execute(upsert(ledger.connection.dialect.name, table, tuple(rows[0]), keys), rows)


def _asset_row(asset: Asset, book: Book) -> dict[str, Any]:
    cell = book.cells.get(asset.place.cell)
    same = ("code", "kind", "name", "state", "zone", "building", "gateway", "maintainer", "since", "until")
    return {
        **{name: getattr(asset, name) for name in same},
        **{name: getattr(asset.place, name) for name in ("lon", "lat", "cell", "road", "address")},
        "grid": cell.grid if cell else "",
        "street": cell.street if cell else "",
        "sensor": book.sensor_of(asset.code),
        "body": text(asset),
    }


def _sensor_row(one: Sensor) -> dict[str, Any]:
    return {
        "sensor": one.id,
        "asset": one.asset,
        "installed_at": one.installed_at,
        "removed_at": one.removed_at,
        "reason": one.reason,
    }
