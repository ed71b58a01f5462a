"""What stands around assets, out of layers and sheets: areas, cells, roads, zones with their outlines; units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
import shapely

from api.assets.book import Book, Shape, Zone
from api.assets.findings import Finding, finding, warning
from api.assets.layers import Feature, geometry_text
from api.assets.sheets import Line, Sheet
from api.cases.lookup import Lookup
from citybrain.model import Area, Cell, Road, Unit

AREAS = ("street", "workstation", "grid", "community")
PARENT = {"workstation": "street", "grid": "workstation", "community": "grid"}
LEVELS: dict[str, Literal[1, 2]] = {"1": 1, "2": 2, "一级": 1, "二级": 2, "": 2}


class Around(msgspec.Struct):
    """Rows read, by the key of their table; the ledger with them; and outlines (shapely) by `kind:code`."""

    units: dict[str, Unit] = msgspec.field(default_factory=dict)
    areas: dict[str, Area] = msgspec.field(default_factory=dict)
    zones: dict[str, Zone] = msgspec.field(default_factory=dict)
    cells: dict[str, Cell] = msgspec.field(default_factory=dict)
    roads: dict[str, Road] = msgspec.field(default_factory=dict)
    shapes: dict[str, Shape] = msgspec.field(default_factory=dict)
    outlines: dict[str, Any] = msgspec.field(default_factory=dict)
    findings: list[Finding] = msgspec.field(default_factory=list)
    read: dict[str, int] = msgspec.field(default_factory=dict)
    all_units: Mapping[str, Unit] = {}
    all_areas: Mapping[str, Area] = {}
    all_zones: Mapping[str, Zone] = {}
    all_cells: Mapping[str, Cell] = {}
    all_roads: Mapping[str, Road] = {}

    def lookup(self) -> Lookup:
        """Return the place lookup of the ledger with this import in it."""
        return Lookup(self.all_cells, self.all_areas, self.all_roads, self.outlines)


def read_around(features: Sequence[Feature], units: Sequence[Sheet], book: Book) -> Around:
    """Read layers and units against the ledger."""
    around = Around()
    kept = _outlines(features, around)
    _keep_outlines(kept, around, book)
    _areas([one for one in kept if one.kind in AREAS], around, book)
    _cells([one for one in kept if one.kind == "cell"], around, book)
    for one in kept:
        if one.kind == "road":
            _road(one, around)
        elif one.kind == "zone":
            around.zones[one.code] = Zone(one.code, one.get("name"), one.get("name_en"))
    around.all_areas = {**book.areas, **around.areas}
    for sheet in units:
        for line in sheet.lines:
            _unit(line, around)
    for name in ("units", "zones", "cells", "roads"):
        setattr(around, f"all_{name}", {**getattr(book, name), **getattr(around, name)})
    _check_parents(around, features)
    around.read = dict(Counter(_TABLE.get(one.kind, "areas") for one in kept)) | {"shapes": len(kept)}
    around.read["units"] = len(around.units)
    return around


_TABLE = {"cell": "cells", "road": "roads", "zone": "zones"}


def _outlines(features: Sequence[Feature], around: Around) -> list[Feature]:
    """Return each feature once: the same in two files is one, two that differ are a mistake."""
    seen: dict[str, Feature] = {}
    for one in features:
        key = f"{one.kind}:{one.code}"
        other = seen.setdefault(key, one)
        if other is one:
            continue
        if one.file == other.file or not shapely.equals_exact(one.outline.normalize(), other.outline.normalize(), 1e-7):
            around.findings.append(finding(one.where, "duplicate_code", code=one.code, other=other.where))
    return list(seen.values())


def _keep_outlines(kept: Sequence[Feature], around: Around, book: Book) -> None:
    stored = list(book.shapes.values())
    drawn = shapely.from_geojson([shape.geometry for shape in stored])
    around.outlines = {f"{shape.kind}:{shape.code}": outline for shape, outline in zip(stored, drawn, strict=True)}
    for one in kept:
        key = f"{one.kind}:{one.code}"
        around.outlines[key] = one.outline
        around.shapes[key] = Shape(one.kind, one.code, geometry_text(one.outline))


def _areas(features: Iterable[Feature], around: Around, book: Book) -> None:
    for one in features:
        kind = cast("Literal['street', 'workstation', 'grid', 'community']", one.kind)
        area = Area(one.code, kind, one.get("name"), one.get("name_en"), one.get("parent"))
        around.areas[f"{one.kind}:{one.code}"] = area


def _check_parents(around: Around, features: Sequence[Feature]) -> None:
    where = {f"{one.kind}:{one.code}": one.where for one in features}
    for key, area in around.areas.items():
        kind = PARENT.get(area.kind)
        if kind and area.parent and f"{kind}:{area.parent}" not in around.all_areas:
            around.findings.append(finding(where[key], "unknown_parent", parent=area.parent, kind=kind))


def _cells(features: Sequence[Feature], around: Around, book: Book) -> None:
    """Read cells: the areas one lies in stand in its properties, else follow from its parent, else from the map."""
    areas = {**book.areas, **around.areas}
    unsaid: list[Feature] = []
    for one in features:
        said = {kind: one.get(kind) for kind in AREAS}
        if one.get("parent"):
            said["community"] = said["community"] or one.get("parent")
        said = _chain(said, areas)
        around.cells[one.code] = Cell(one.code, said["grid"], said["street"], said["workstation"], said["community"])
        if not (said["grid"] and said["street"]):
            unsaid.append(one)
    if unsaid:
        _by_map(unsaid, around, areas)


def _chain(said: dict[str, str], areas: Mapping[str, Area]) -> dict[str, str]:
    """Fill in the areas above those that are said."""
    for kind in ("community", "grid", "workstation"):
        area = areas.get(f"{kind}:{said[kind]}")
        if area is not None and area.parent:
            above = PARENT[kind]
            said = {**said, above: said[above] or area.parent}
    return said


def _by_map(unsaid: Sequence[Feature], around: Around, areas: Mapping[str, Area]) -> None:
    lookup = Lookup({}, areas, {}, {key: one for key, one in around.outlines.items() if key.partition(":")[0] in AREAS})
    middle = [one.outline.representative_point() for one in unsaid]
    found = lookup.find([point.x for point in middle], [point.y for point in middle]) if lookup.has_areas else None
    for number, one in enumerate(unsaid):
        cell = around.cells[one.code]
        if found is not None:
            cell = Cell(
                cell.code,
                cell.grid or found.grid[number],
                cell.street or found.street[number],
                cell.workstation or found.workstation[number],
                cell.community or found.community[number],
            )
        around.cells[one.code] = cell
        if not (cell.grid and cell.street):
            around.findings.append(warning(one.where, "cell_unplaced", code=one.code))


def _road(one: Feature, around: Around) -> None:
    level = LEVELS.get(one.get("level"))
    if level is None:
        around.findings.append(finding(one.where, "road_level", level=one.get("level")))
        return
    around.roads[one.code] = Road(one.code, one.get("name"), one.get("name_en"), level, one.get("chief"))


def _unit(line: Line, around: Around) -> None:
    code = line.get("code")
    if not code:
        around.findings.append(finding(line.at("code"), "no_code"))
        return
    street = _street(line, around)
    unit = Unit(code, line.get("name"), line.get("name_en"), street, line.get("department"))
    if code in around.units and around.units[code] != unit:
        around.findings.append(finding(line.at("code"), "duplicate_code", code=code, other="–"))
    around.units[code] = unit


def _street(line: Line, around: Around) -> str:
    """Return the code of the street a unit names; where streets are known it has to be one of them."""
    said = line.get("street")
    streets = [area for area in around.all_areas.values() if area.kind == "street"]
    if not said or not streets:
        return said
    named = [area.code for area in streets if said in (area.code, area.zh, area.en)]
    if not named:
        around.findings.append(finding(line.at("street"), "unknown_parent", parent=said, kind="street"))
    return named[0] if named else said
