"""The district as map layers: areas, cells, pressure zones and roads, as GeoJSON and as Shapefile.

Coordinates are CGCS2000 degrees. RFC 7946 asks GeoJSON for WGS-84, which differs from it by less than a metre; in an
invented district the two are the same. Outlines are unions of cells, so neighbours share their corners exactly.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import shapefile
import shapely
from shapely.geometry.base import BaseGeometry

from citybrain.model import Cell
from simulators.world.city import DIVISION, District, degrees

Properties = dict[str, str | int]

LEVELS = ("street", "workstation", "grid", "community")  # from the largest to the smallest
FILES = {"street": "streets", "workstation": "workstations", "grid": "grids", "community": "communities"}
# EPSG:4490 as ESRI writes it: what a desktop GIS reads from a .prj file.
PRJ = (
    'GEOGCS["GCS_China_Geodetic_Coordinate_System_2000",DATUM["D_China_2000",SPHEROID["CGCS2000",6378137.0,'
    '298.257222101]],PRIMEM["Greenwich",0.0],UNIT["Degree",0.0174532925199433]]'
)
DBF_DATE = bytes((100, 1, 1))  # 2000-01-01 in place of today, so that one seed gives the same bytes
TEXT_BYTES = 100  # of a text field in a .dbf: UTF-8, three bytes a Chinese character


class Feature(msgspec.Struct, frozen=True):
    """One area, cell, zone or road: its properties, and its outline or centre line in degrees."""

    properties: Properties
    shape: BaseGeometry


def layers(district: District) -> dict[str, list[Feature]]:
    """Return the layers by file name; a level that the district does not have is left out."""
    found = {FILES[level]: _areas(district, level) for level in LEVELS}
    found |= {"cells": _cells(district), "zones": _zones(district), "roads": _roads(district)}
    return {name: features for name, features in found.items() if features}


def geojson(features: Sequence[Feature]) -> bytes:
    """Return a layer as an RFC 7946 feature collection, outer rings counter-clockwise."""
    return msgspec.json.encode(
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "properties": feature.properties, "geometry": feature.shape.__geo_interface__}
                for feature in features
            ],
        }
    )


def shapefiles(features: Sequence[Feature]) -> dict[str, bytes]:
    """Return a layer as the files of a Shapefile, by their suffix (ESRI Shapefile Technical Description, 1998)."""
    shp, shx, dbf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with shapefile.Writer(shp=shp, shx=shx, dbf=dbf, encoding="utf-8") as writer:
        for name, value in features[0].properties.items():
            writer.field(name, "N" if isinstance(value, int) else "C", size=4 if isinstance(value, int) else TEXT_BYTES)
        for feature in features:
            writer.shape(feature.shape.__geo_interface__)
            writer.record(**feature.properties)
    return {
        ".shp": shp.getvalue(),
        ".shx": shx.getvalue(),
        ".dbf": dbf.getvalue()[:1] + DBF_DATE + dbf.getvalue()[4:],
        ".prj": PRJ.encode(),
        ".cpg": b"UTF-8",
    }


def _outline(district: District, cells: Sequence[str]) -> BaseGeometry:
    """Return the union of cells. Their corners are rounded before, so that no sliver is left between two areas."""
    boxes = []
    for west, south, east, north in (district.boxes[code] for code in cells):
        boxes.append(shapely.box(*degrees(west, south), *degrees(east, north)))
    return shapely.orient_polygons(shapely.coverage_union_all(boxes))


def _properties(code: str, name: str, name_en: str, kind: str, parent: str) -> Properties:
    return {"code": code, "name": name, "name_en": name_en, "kind": kind, "parent": parent}


def _areas(district: District, level: str) -> list[Feature]:
    members: dict[str, list[Cell]] = defaultdict(list)
    for cell in district.registry.cells:
        if getattr(cell, level):
            members[getattr(cell, level)].append(cell)
    named = {area.code: area for area in district.registry.areas if area.kind == level}
    found = []
    for code, cells in members.items():
        zh, en = (named[code].zh, named[code].en) if code in named else (code, code)
        shape = _outline(district, [cell.code for cell in cells])
        found.append(Feature(_properties(code, zh, en, level, _parent(cells[0], level)), shape))
    return found


def _parent(cell: Cell, level: str) -> str:
    """Return the code of the area one level up, the district's for a street, "" in a city without that level."""
    above = LEVELS.index(level) - 1
    return DIVISION if above < 0 else str(getattr(cell, LEVELS[above]))


def _cells(district: District) -> list[Feature]:
    found = []
    for cell in district.registry.cells:
        parent = cell.community or cell.grid
        found.append(Feature(_properties(cell.code, "", "", "cell", parent), _outline(district, [cell.code])))
    return found


def _zones(district: District) -> list[Feature]:
    found = []
    for code, cells in district.zone_cells.items():
        number = code.removeprefix("zone-")
        properties = _properties(code, f"供水{number}区", f"Pressure zone {number}", "zone", "")
        found.append(Feature(properties, _outline(district, cells)))
    return found


def _roads(district: District) -> list[Feature]:
    found = []
    for road in district.registry.roads:
        properties = _properties(road.code, road.zh, road.en, "road", "") | {"level": road.level, "chief": road.chief}
        found.append(Feature(properties, shapely.LineString([degrees(*at) for at in district.lines[road.code]])))
    return found
