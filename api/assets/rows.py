"""Rows of sheets as assets and gateways: each value checked where it stands, each place found on the map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from api.assets.areas import AREAS, Around
from api.assets.book import ASSET, IN_SERVICE, STATES, TO_STATE, Asset, Book, Sensor
from api.assets.changes import Note, removed
from api.assets.coordinates import PLAIN, to_cgcs2000
from api.assets.findings import Finding, errors, finding, warning
from api.assets.kinds import NAMES, Lists, as_boxes_tell, kinds, metrics_of, with_own
from api.assets.layers import DECIMALS, place_problem
from api.assets.sheets import Line, Sheet, plain
from api.cases.lookup import METRES_PER_DEGREE, Lookup, Places
from citybrain.errors import UsageError
from citybrain.model import Gateway, Place
from citybrain.units import METRICS

STATE_NAMES = {
    "planned": ("规划", "在建", "未安装"),
    "commissioning": ("试运行", "调试"),
    "active": ("在用", "启用", "正常", "完好"),
    "retired": ("退役", "停用", "报废", "废弃", "移除", "拆除"),
}
_STATES = {plain(name): state for state, all_names in STATE_NAMES.items() for name in (state, *all_names)}
ROAD_AWAY_M = 150.0  # [U] our choice: a square's far side; further away it is another road
MOVED_M = 200.0  # [U] our choice: assets do not walk; worth a look, no mistake
LONGEST_NAME = 128  # what quarantine takes (streams.quarantine)


class Assets(msgspec.Struct):
    """What rows of assets and gateways come to; `lines`: where `asset CODE` and `gateway CODE` stand."""

    assets: list[Asset] = msgspec.field(default_factory=list)
    gateways: list[Gateway] = msgspec.field(default_factory=list)
    sensors: tuple[Sensor, ...] = ()
    notes: list[Note] = msgspec.field(default_factory=list)
    findings: list[Finding] = msgspec.field(default_factory=list)
    lines: dict[str, Line] = msgspec.field(default_factory=dict)
    read: dict[str, int] = msgspec.field(default_factory=dict)


class Row(msgspec.Struct, frozen=True):
    """A row that can be placed: its line and its sheet's name."""

    line: Line
    sheet: Sheet
    code: str
    place: Place


def read_assets(sheets: Sequence[Sheet], around: Around, book: Book, *, crs: str, at_ms: int, reason: str) -> Assets:
    """Read sheets of assets and gateways; `at_ms` is when what is new was installed."""
    made = Assets()
    lines = [(line, sheet) for sheet in sheets for line in sheet.lines]
    rows = _placed(lines, around, crs, made.findings)
    for row in rows:
        if "shard" in row.sheet.fields:
            _gateway(row, made)
    _rows(_once([row for row in rows if "shard" not in row.sheet.fields], made), around, book, made, at_ms, reason)
    _own_assets(_once([row for row in rows if "shard" in row.sheet.fields], made), book, made, at_ms, reason)
    made.read = {"assets": len(made.assets), "gateways": len(made.gateways)}
    return made


# --- places -----------------------------------------------------------------------------------------------------


def _placed(lines: Sequence[tuple[Line, Sheet]], around: Around, crs: str, found: list[Finding]) -> list[Row]:
    """Return the rows that have a code and a place, with what the map says of it."""
    usable = [(line, sheet, xy) for line, sheet in lines if (xy := _numbers(line, found)) is not None]
    lon, lat = _converted([(line, xy) for line, _, xy in usable], crs, found)
    lookup = around.lookup()
    fine = [number for number in range(len(usable)) if not _misplaced(usable[number][0], lon, lat, number, found)]
    places = lookup.find(lon[fine], lat[fine])
    rows = []
    for n, number in enumerate(fine):
        line, sheet, _ = usable[number]
        at = _located(line, float(lon[number]), float(lat[number]), places, n, around, lookup, found)
        if at is not None:
            rows.append(Row(line, sheet, line.get("code"), at))
    return rows


def _numbers(line: Line, found: list[Finding]) -> tuple[float, float] | None:
    """Return a row's coordinates as they stand, None where they, or its code, cannot be used."""
    if not line.get("code"):
        found.append(finding(line.at("code"), "no_code"))
        return None
    values = [number(line.get(field)) for field in ("lon", "lat")]
    for field, value in zip(("lon", "lat"), values, strict=True):
        if value is None:
            found.append(finding(line.at(field), "not_a_number", value=line.get(field) or "–", expected="121.473701"))
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def number(text: str) -> float | None:
    """Return a finite number, None where the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _converted(rows: Sequence[tuple[Line, tuple[float, float]]], crs: str, found: list[Finding]) -> tuple[Any, Any]:
    x, y = (np.array([xy[axis] for _, xy in rows], np.float64) for axis in (0, 1))
    named = [line.get("crs") or crs for line, _ in rows]
    for name in dict.fromkeys(named):
        mine = np.array([each == name for each in named], bool)
        try:
            lon, lat = to_cgcs2000(x[mine], y[mine], name)
        except UsageError as error:
            first = next(line for (line, _), each in zip(rows, named, strict=True) if each == name)
            found.append(finding(first.at("crs"), "unknown_crs", what=error))
            lon = lat = np.full(int(mine.sum()), np.nan)
        given = plain(name) in PLAIN
        x[mine], y[mine] = (lon, lat) if given else (np.round(lon, DECIMALS), np.round(lat, DECIMALS))
    return x, y


def _misplaced(line: Line, lon: Any, lat: Any, n: int, found: list[Finding]) -> bool:
    wrong = place_problem(float(lon[n]), float(lat[n]))
    if wrong == "no_place" and any(one.code == "unknown_crs" for one in found):
        return True
    if wrong:
        found.append(finding(line.at("lon"), wrong, lon=line.get("lon"), lat=line.get("lat")))
    return bool(wrong)


def _located(
    line: Line, lon: float, lat: float, places: Places, n: int, around: Around, lookup: Lookup, found: list[Finding]
) -> Place | None:
    """Return a row's place: what the map says, checked against what the sheet says."""
    cell = places.cell[n]
    if lookup.has_areas and not cell and not any(getattr(places, kind)[n] for kind in AREAS):
        found.append(finding(line.at("lon"), "outside_district", lon=f"{lon:.6f}", lat=f"{lat:.6f}"))
        return None
    before = len(found)
    if "cell" in line and cell != line.get("cell"):
        if cell or line.get("cell") not in around.all_cells:
            found.append(_elsewhere(line, "cell", cell))
        cell = line.get("cell")
    for kind in AREAS:
        known = getattr(places, kind)[n]
        if kind in line and known and not _is_named(around.all_areas.get(f"{kind}:{known}"), known, line.get(kind)):
            found.append(_elsewhere(line, kind, known))
    road = _road(line, lon, lat, places.road[n], around, lookup, found)
    return Place(lon, lat, cell, line.get("address"), road) if len(found) == before else None


def _elsewhere(line: Line, kind: str, known: str) -> Finding:
    return finding(line.at(kind), "elsewhere", kind=kind, said=line.get(kind), found=known or "–")


def _is_named(thing: Any, code: str, said: str) -> bool:
    return said == code or (thing is not None and said in (thing.zh, thing.en))


def _road(
    line: Line, lon: float, lat: float, nearest: str, around: Around, lookup: Lookup, found: list[Finding]
) -> str:
    said = line.get("road")
    if not said or _is_named(around.all_roads.get(nearest), nearest, said):
        return nearest
    named = [road.code for road in around.all_roads.values() if _is_named(road, road.code, said)]
    outlines = [around.outlines[f"road:{code}"] for code in named if f"road:{code}" in around.outlines]
    if not named:
        found.append(finding(line.at("road"), "unknown_road", road=said))
    elif outlines and min(lookup.road_distance_m(lon, lat, one) for one in outlines) > ROAD_AWAY_M:
        found.append(_elsewhere(line, "road", nearest))
    return named[0] if named else ""


# --- once -------------------------------------------------------------------------------------------------------


def _once(rows: Iterable[Row], made: Assets) -> list[Row]:
    """Return each code's row once: the same row in two files is one, a code given twice is a mistake."""
    kept: list[Row] = []
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.code, row)
        if other is row:
            kept.append(row)
            continue
        if other.sheet.file != row.sheet.file and other.place == row.place and _values(other) == _values(row):
            continue
        moved = (other.place.lon, other.place.lat) != (row.place.lon, row.place.lat)
        code = "two_places" if moved else "duplicate_code"
        made.findings.append(finding(row.line.at("code"), code, code=row.code, other=other.line.at("code")))
    return kept


def _values(row: Row) -> dict[str, str]:
    kind = row.line.get("kind") or row.sheet.name
    return {**row.line.values, "kind": NAMES.get(kind, kind), "lon": "", "lat": ""}


# --- gateways ---------------------------------------------------------------------------------------------------


def _gateway(row: Row, made: Assets) -> None:
    shard = number(row.line.get("shard"))
    if shard is None or shard != int(shard) or shard < 0:
        made.findings.append(
            finding(row.line.at("shard"), "not_a_number", value=row.line.get("shard") or "–", expected="0")
        )
        return
    made.lines[f"gateway {row.code}"] = row.line
    made.gateways.append(Gateway(row.code, int(shard), row.place))


def _own_assets(rows: Iterable[Row], book: Book, made: Assets, at_ms: int, reason: str) -> None:
    """A gateway is an asset too: its own heartbeat has alarms. Where no sheet of assets has it, it becomes one."""
    known = {asset.code for asset in made.assets}
    metrics, events = metrics_of("gateway", ())
    for row in rows:
        if row.code in known:
            continue
        old = book.assets.get(row.code)
        name = row.line.get("name") or (old.name if old else "")
        asset = Asset(row.code, "gateway", "active", row.place, row.code, metrics, events, name=name, since=at_ms)
        if old is not None:
            asset = msgspec.structs.replace(old, place=row.place, name=name, metrics=with_own(old.metrics))
        _add(asset, row.code, book, made, at_ms, reason)


# --- assets -----------------------------------------------------------------------------------------------------


def _rows(rows: Iterable[Row], around: Around, book: Book, made: Assets, at_ms: int, reason: str) -> None:
    for row in rows:
        made.lines[f"asset {row.code}"] = row.line
        before = len(made.findings)
        asset = _asset(row, around, book.assets.get(row.code), made.findings, at_ms)
        serves = asset is not None and asset.state in IN_SERVICE
        sensor = row.line.get("sensor") or book.sensor_of(row.code) or (row.code if serves else "")
        if len(sensor) > LONGEST_NAME:
            made.findings.append(finding(row.line.at("sensor"), "long_name", most=LONGEST_NAME))
        if asset is not None and not errors(made.findings[before:]):
            _add(asset, sensor, book, made, at_ms, reason)


def _asset(row: Row, around: Around, old: Asset | None, found: list[Finding], at_ms: int) -> Asset | None:
    line = row.line
    kind = line.get("kind") or (row.sheet.name if NAMES.get(row.sheet.name, row.sheet.name) in kinds() else "")
    kind = NAMES.get(kind, kind) or (old.kind if old else "")
    if kind not in kinds():
        found.append(finding(line.at("kind"), "unknown_kind", kind=kind or "–", known=", ".join((*NAMES, *kinds()))))
        return None
    state = _state(line, old, found)
    nominal = _nominal(line, found)
    tags = _list(line.get("tags")) if "tags" in line else old.tags if old else ()
    if old is not None and _metres(old.place, row.place) > MOVED_M:
        found.append(warning(line.at("lon"), "moved", code=row.code, metres=round(_metres(old.place, row.place))))

    def said(field: str) -> str:
        return line.get(field) or (str(getattr(old, field)) if old else "")

    metrics, events = _metrics(line, kind, tags, said("gateway"), old)
    place = row.place if row.place.address or old is None else msgspec.structs.replace(
        row.place, address=old.place.address
    )  # fmt: skip
    return Asset(
        row.code, kind, cast("Any", state), place, said("gateway"), metrics, events,
        _zone(said("zone"), around), said("building"), said("name"), tags, _unit(said("maintainer"), around),
        nominal or (old.nominal if old else {}), old.since if old else at_ms, old.until if old else None,
    )  # fmt: skip


def _state(line: Line, old: Asset | None, found: list[Finding]) -> str:
    said = line.get("state")
    if not said:
        return old.state if old else "active"
    state = _STATES.get(plain(said), "")
    if not state:
        found.append(finding(line.at("state"), "unknown_state", state=said, known=", ".join(STATES)))
        return "active"
    before = old.state if old else "new"
    if before != state and ASSET.find(before, TO_STATE[state]) is None:
        found.append(finding(line.at("state"), "no_step", before=before, after=state))
    return state


def _metrics(line: Line, kind: str, tags: tuple[str, ...], gateway: str, old: Asset | None) -> Lists:
    if "metrics" in line or "events" in line:
        return _list(line.get("metrics")), _list(line.get("events"))
    if old is not None and (old.kind, old.tags) == (kind, tags):
        return as_boxes_tell(kind, tags, gateway, (old.metrics, old.event_metrics))
    return metrics_of(kind, tags, gateway)


def _nominal(line: Line, found: list[Finding]) -> dict[str, float]:
    """Return usual values by metric; what is out of the metric's range stands in another unit, or is wrong."""
    values: dict[str, float] = {}
    for field, text in line.values.items():
        if not field.startswith("="):
            continue
        metric, value = METRICS[field[1:]], number(text)
        if value is None:
            found.append(finding(line.at(field), "not_a_number", value=text, expected=f"0.3 {metric.unit}"))
        elif not metric.low <= value <= metric.high:
            facts = {"value": text, "name": metric.name, "unit": metric.unit}
            found.append(finding(line.at(field), "out_of_range", low=metric.low, high=metric.high, **facts))
        else:
            values[metric.name] = value
    return values


def _zone(said: str, around: Around) -> str:
    named = [zone.code for zone in around.all_zones.values() if said and said in (zone.code, zone.zh, zone.en)]
    return named[0] if named else said


def _unit(said: str, around: Around) -> str:
    if said in around.all_units:
        return said
    named = [unit.code for unit in around.all_units.values() if said and said in (unit.zh, unit.en)]
    return named[0] if named else said


def _list(text: str) -> tuple[str, ...]:
    return tuple(
        part
        for part in text.replace("，", ",").replace("、", ",").replace(";", ",").replace(" ", ",").split(",")
        if part
    )


def _metres(one: Place, other: Place) -> float:
    shrunk = math.cos(math.radians(one.lat))
    return math.hypot((one.lon - other.lon) * shrunk, one.lat - other.lat) * METRES_PER_DEGREE


def _add(asset: Asset, sensor: str, book: Book, made: Assets, at_ms: int, reason: str) -> None:
    """Take an asset with its sensor, and note what became of it."""
    old, carried = book.assets.get(asset.code), book.sensor_of(asset.code)
    details: dict[str, Any] = {}
    if asset.state == "retired":
        made.sensors += removed(book, asset.code, at_ms, reason)
        asset = msgspec.structs.replace(asset, until=asset.until or at_ms)
    elif sensor and sensor != carried:
        made.sensors += (*removed(book, asset.code, at_ms, reason), Sensor(sensor, asset.code, at_ms, reason=reason))
        details["sensor"] = sensor
    made.assets.append(asset)
    moved = _event(old, asset, replaced=bool(carried) and bool(details))
    if moved is not None:
        made.notes.append(Note(asset.code, moved, details))


def _event(old: Asset | None, asset: Asset, *, replaced: bool) -> Any:
    before = old.state if old else "new"
    if before != asset.state:
        return ASSET.find(before, TO_STATE[asset.state])
    if replaced:
        return ASSET.find(before, "replace")
    return ASSET.find(before, "edit") if old != asset else None
