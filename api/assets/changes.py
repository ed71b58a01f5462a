"""Changes of the ledger: pure functions from the ledger and a wish to a change set, and what a change set makes of it.

A change set holds whole rows. It is made by whoever asks (import) or by the desk from a small command, checked by the
same `problems`, and then all of it is written or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from api.assets.book import ASSET, IN_SERVICE, TO_STATE, Asset, Book, Sensor, Shape, Zone, registry_of
from api.assets.findings import Finding, Refused, errors, finding
from api.assets.kinds import as_boxes_tell, metrics_of, with_own
from citybrain.errors import ConfigError, NotFound, UsageError
from citybrain.machine import Moved
from citybrain.model import Area, Cell, Gateway, Place, Road, Unit
from citybrain.units import METRICS
from streams.registry import Index


class Note(msgspec.Struct, frozen=True):
    """A line of an asset's history."""

    asset: str
    moved: Moved
    details: dict[str, Any] = {}


class Changes(msgspec.Struct, frozen=True):
    """Rows that are new or other than before, and what is to be told of it. `base`: the version they were made from."""

    base: int
    assets: tuple[Asset, ...] = ()
    sensors: tuple[Sensor, ...] = ()
    gateways: tuple[Gateway, ...] = ()
    units: tuple[Unit, ...] = ()
    areas: tuple[Area, ...] = ()
    zones: tuple[Zone, ...] = ()
    cells: tuple[Cell, ...] = ()
    roads: tuple[Road, ...] = ()
    shapes: tuple[Shape, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each table there are, where there are any."""
        return {name: len(rows) for name in TABLES if (rows := getattr(self, name))}


TABLES = ("assets", "sensors", "gateways", "units", "areas", "zones", "cells", "roads", "shapes")


def encode_changes(changes: Changes) -> bytes:
    """Return a change set's canonical bytes."""
    return msgspec.json.encode(changes, order="deterministic")


def decode_changes(content: bytes) -> Changes:
    """Return a change set; raises ConfigError."""
    try:
        return msgspec.json.decode(content, type=Changes)
    except msgspec.DecodeError as error:
        raise ConfigError("change set", str(error)) from None


# --- doing ------------------------------------------------------------------------------------------------------


def applied(book: Book, changes: Changes) -> Book:
    """Return the ledger with a change set in it; its version is one more."""
    sensors = dict(book.sensors)
    for one in changes.sensors:
        kept = [s for s in sensors.get(one.asset, ()) if (s.id, s.installed_at) != (one.id, one.installed_at)]
        sensors[one.asset] = tuple(sorted((*kept, one), key=lambda s: (s.installed_at, s.removed_at is None)))
    return msgspec.structs.replace(
        book,
        version=book.version + 1,
        sensors=sensors,
        **{
            name: {**getattr(book, name), **{key_of(row): row for row in rows}}
            for name in TABLES
            if name != "sensors" and (rows := getattr(changes, name))
        },
    )


def key_of(row: Any) -> str:
    """Return the key of a row in its table of the book."""
    if isinstance(row, Area | Shape):
        return f"{row.kind}:{row.code}"
    return str(row.id if isinstance(row, Gateway) else row.code)


def check(book: Book, changes: Changes, shards: Iterable[int]) -> Book:
    """Return the ledger with a change set in it; raises Refused with everything that is wrong with it."""
    if changes.base != book.version:
        raise Refused([finding("version", "stale", base=changes.base, version=book.version)])
    after = applied(book, changes)
    found = errors(problems(after, shards, book))
    if found:
        raise Refused(found)
    return after


def problems(book: Book, shards: Iterable[int], before: Book) -> list[Finding]:
    """Return everything that does not fit together in a ledger; where is `asset CODE` and the like."""
    found = [*_gateway_problems(book, set(shards), before)]
    zones: dict[str, set[int]] = {}
    carried: dict[str, str] = {}
    for asset in book.assets.values():
        if asset.state == "retired":
            continue
        found += _asset_problems(book, asset)
        gateway = book.gateways.get(asset.gateway)
        if asset.zone and gateway is not None and asset.state in IN_SERVICE and asset.kind != "gateway":
            zones.setdefault(asset.zone, set()).add(gateway.shard)
        sensor = book.sensor_of(asset.code)
        if sensor and carried.setdefault(sensor, asset.code) != asset.code:
            found.append(finding(f"asset {asset.code}", "sensor_taken", sensor=sensor, asset=carried[sensor]))
    found += [
        finding(f"zone {zone}", "zone_split", zone=zone, shards=", ".join(map(str, sorted(own))))
        for zone, own in sorted(zones.items())
        if len(own) > 1
    ]
    if not errors(found):
        try:
            Index(registry_of(book), "")
        except ConfigError as error:
            found.append(finding(error.where, "registry", what=error.what))
    return found


def _gateway_problems(book: Book, shards: set[int], before: Book) -> Iterable[Finding]:
    for gateway in book.gateways.values():
        where, old = f"gateway {gateway.id}", before.gateways.get(gateway.id)
        if gateway.shard not in shards:
            yield finding(where, "shard", shard=gateway.shard, shards=", ".join(map(str, sorted(shards))))
        elif old is not None and old.shard != gateway.shard:
            yield finding(where, "shard_moved", gateway=gateway.id, before=old.shard, after=gateway.shard)


def _asset_problems(book: Book, asset: Asset) -> Iterable[Finding]:
    where = f"asset {asset.code}"
    if asset.state in IN_SERVICE and asset.gateway not in book.gateways:
        yield finding(where, "unknown_gateway", gateway=asset.gateway, known=near(book.gateways))
    if asset.zone and book.zones and asset.zone not in book.zones:
        yield finding(where, "unknown_zone", zone=asset.zone, known=near(book.zones))
    if asset.maintainer and asset.maintainer not in book.units:
        yield finding(where, "unknown_unit", unit=asset.maintainer, known=near(book.units))
    for metric in (*asset.metrics, *asset.event_metrics):
        if metric not in METRICS:
            yield finding(where, "unknown_metric", metric=metric)


def near(known: Iterable[str]) -> str:
    """Return some of what there is, for a message."""
    names = sorted(known)
    return ", ".join(names[:8]) + (f" … ({len(names)})" if len(names) > 8 else "") if names else "–"


# --- small wishes -----------------------------------------------------------------------------------------------


class Adopt(msgspec.Struct, frozen=True):
    """A sensor gets its asset: one that is in the ledger, or a new one of which kind and place must be said."""

    sensor: str
    asset: str
    gateway: str = ""
    kind: str = ""
    name: str = ""
    place: Place | None = None
    zone: str = ""
    building: str = ""
    maintainer: str = ""
    tags: tuple[str, ...] = ()
    state: Literal["commissioning", "active"] = "active"


class Replace(msgspec.Struct, frozen=True):
    """An asset gets another sensor."""

    asset: str
    sensor: str


class Move(msgspec.Struct, frozen=True):
    """An asset goes to another state."""

    asset: str


def adopt(book: Book, wish: Adopt, at_ms: int, reason: str) -> Changes:
    """Return what adopting a sensor changes; raises Refused, UsageError."""
    asset = book.assets.get(wish.asset)
    if asset is None:
        asset = _new(wish)
        before = "new"
    else:
        before = asset.state
        if carried := book.sensor_of(asset.code):
            if carried == wish.sensor:
                raise UsageError(f"asset {asset.code}: it carries sensor {wish.sensor!r} already")
            what = f"it carries sensor {carried!r}; `devices replace {asset.code} {wish.sensor}` puts another on it"
            raise UsageError(f"asset {asset.code}: {what}")
        gateway = wish.gateway or asset.gateway
        metrics, events = as_boxes_tell(asset.kind, asset.tags, gateway, (asset.metrics, asset.event_metrics))
        asset = msgspec.structs.replace(asset, gateway=gateway, metrics=metrics, event_metrics=events)
    moved = ASSET.move(before, TO_STATE[wish.state])
    asset = msgspec.structs.replace(asset, state=wish.state, since=at_ms)
    note = Note(asset.code, moved, {"sensor": wish.sensor})
    return Changes(book.version, (asset,), (Sensor(wish.sensor, asset.code, at_ms, reason=reason),), notes=(note,))


def _new(wish: Adopt) -> Asset:
    if not wish.kind or wish.place is None:
        raise UsageError(f"asset {wish.asset}: not in the ledger; a new one needs --kind, --lon and --lat")
    metrics, events = metrics_of(wish.kind, wish.tags, wish.gateway)
    return Asset(
        wish.asset, wish.kind, "planned", wish.place, wish.gateway, metrics, events, wish.zone, wish.building,
        wish.name, wish.tags, wish.maintainer,
    )  # fmt: skip


def replace(book: Book, wish: Replace, at_ms: int, reason: str) -> Changes:
    """Return what another sensor on an asset changes: one name in the registry; the history goes on."""
    asset = asset_of(book, wish.asset)
    moved = ASSET.move(asset.state, "replace")
    old = book.sensor_of(asset.code)
    if old == wish.sensor:
        raise UsageError(f"asset {asset.code}: it carries sensor {wish.sensor!r} already")
    note = Note(asset.code, moved, {"sensor": wish.sensor, "before": old})
    new = Sensor(wish.sensor, asset.code, at_ms, reason=reason)
    return Changes(book.version, sensors=(*removed(book, asset.code, at_ms, reason), new), notes=(note,))


def removed(book: Book, asset: str, at_ms: int, reason: str) -> tuple[Sensor, ...]:
    """Return the sensor that an asset carries as taken away at `at_ms`."""
    own = book.sensors.get(asset, ())
    if not own or own[-1].removed_at is not None:
        return ()
    return (msgspec.structs.replace(own[-1], removed_at=at_ms, reason=reason or own[-1].reason),)


def move(book: Book, code: str, event: str, at_ms: int, reason: str) -> Changes:
    """Return what `commission`, `activate` or `retire` changes; raises NotFound, TransitionError, UsageError."""
    asset = asset_of(book, code)
    moved = ASSET.move(asset.state, event)
    if event == "retire":
        after = msgspec.structs.replace(asset, state="retired", until=at_ms)
        return Changes(book.version, (after,), removed(book, code, at_ms, reason), notes=(Note(code, moved),))
    if not book.sensor_of(code):
        raise UsageError(f"asset {code}: it carries no sensor yet; `devices adopt WIRE_ID --asset {code}` gives it one")
    since = at_ms if asset.state == "planned" else asset.since
    after = msgspec.structs.replace(asset, state=moved.after, since=since)
    return Changes(book.version, (after,), notes=(Note(code, moved),))


class Sheet(msgspec.Struct, frozen=True):
    """A gateway has been commissioned: `sheet` is the signed sheet's hash, `devices` are those that were seen."""

    gateway: str
    sheet: str
    devices: tuple[str, ...]
    lon: float
    lat: float
    photo: str = ""  # its hash
    accuracy_m: float = 0.0  # how far the position may be off, 0 where nobody knows


def commission_gateway(book: Book, wish: Sheet) -> Changes:
    """Return what a commissioning sheet changes: what was on trial behind the gateway and was seen is in service.

    Raises NotFound where the ledger has no such gateway.
    """
    if wish.gateway not in book.gateways:
        raise NotFound(f"gateway {wish.gateway[:60]!r}: not in the ledger")
    said = set(wish.devices)
    details = {"sheet": wish.sheet}
    after, notes = [], []
    for asset in book.assets.values():
        if asset.gateway == wish.gateway and asset.code in said and asset.state == "commissioning":
            moved = ASSET.move("commissioning", "activate")
            after.append(msgspec.structs.replace(asset, state=moved.after))
            notes.append(Note(asset.code, moved, details))
    own = book.assets.get(wish.gateway)
    if own is not None:
        moved = ASSET.move(own.state, "activate" if own.state == "commissioning" else "edit")
        after.append(msgspec.structs.replace(own, state=moved.after, metrics=with_own(own.metrics)))
        where: dict[str, Any] = {"lon": wish.lon, "lat": wish.lat}
        if wish.accuracy_m:  # else a journal of the release before would be told otherwise
            where["accuracy_m"] = wish.accuracy_m
        notes.append(Note(own.code, moved, {**details, **where, "devices": len(wish.devices), "photo": wish.photo}))
    return Changes(book.version, tuple({one.code: one for one in after}.values()), notes=tuple(notes))


def asset_of(book: Book, code: str) -> Asset:
    """Return an asset; raises NotFound."""
    found = book.assets.get(code)
    if found is None:
        raise NotFound(f"asset {code[:60]!r}: not in the ledger")
    return found


def subject_known(book: Book, subject: str) -> None:
    """Check what an entry of a register is about: an asset in use, or an area; raises NotFound, UsageError."""
    scope, colon, code = subject.partition(":")
    if not colon:
        if asset_of(book, subject).state == "retired":
            raise UsageError(f"asset {subject}: it is retired")
        return
    if scope not in SCOPES:
        raise UsageError(
            f"subject {subject[:60]!r}: expected an asset's code, or {', '.join(f'{s}:CODE' for s in SCOPES)}"
        )
    if code not in _members(book)[scope]:
        raise NotFound(f"{scope} {code[:60]!r}: not in the ledger")


SCOPES = ("grid", "zone", "building", "street")


def _members(book: Book) -> Mapping[str, set[str]]:
    assets = book.assets.values()
    return {
        "grid": {cell.grid for cell in book.cells.values()},
        "street": {cell.street for cell in book.cells.values()},
        "zone": {asset.zone for asset in assets} | set(book.zones),
        "building": {asset.building for asset in assets},
    }
