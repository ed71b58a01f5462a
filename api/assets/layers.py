"""Layers: streets, workstations, grids, communities, cells, roads and pressure zones, from GeoJSON or Shapefile.

A feature has properties `code`, `name`, `name_en`, `kind`, `parent`; a road also `level` and `chief`, a cell the areas
it lies in where its parent chain does not say them. The kind is that of the file where a feature has none.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import shapely
from shapely.geometry import shape as geometry_of
from shapely.validation import explain_validity

from api.assets.coordinates import F64, is_projected, to_cgcs2000
from api.assets.findings import Finding, finding
from api.assets.sheets import decoded, plain

KINDS = {
    "street": ("streets", "街道", "街镇"),
    "workstation": ("workstations", "工作站", "街区工作站"),
    "grid": ("grids", "网格", "责任网格"),
    "community": ("communities", "居委会", "居民区", "社区"),
    "cell": ("cells", "单元网格", "万米网格"),
    "road": ("roads", "道路"),
    "zone": ("zones", "压力分区", "供水分区"),
}
_KIND = {plain(name): kind for kind, names in KINDS.items() for name in (kind, *names)}
_CUT = {"workstatio": "workstation"}  # a dBASE column's name has ten letters at most
LINES = frozenset({"LineString", "MultiLineString"})
POLYGONS = frozenset({"Polygon", "MultiPolygon"})
DECIMALS = 8  # of a degree: 1 mm


class Feature(msgspec.Struct, frozen=True):
    """One feature: what its properties say, and its outline (shapely, CGCS2000 degrees)."""

    file: str
    where: str
    kind: str
    code: str
    facts: Mapping[str, str]
    outline: Any

    def get(self, name: str) -> str:
        """Return a property, "" where there is none."""
        return self.facts.get(name, "")


def read_layer(name: str, content: bytes, crs: str, beside: Mapping[str, bytes]) -> tuple[list[Feature], list[Finding]]:
    """Return the features of a .geojson, .json or .shp file, and what is wrong with them.

    `beside`: the files that lie beside a .shp (`.dbf`, `.prj`, `.cpg`), by suffix.
    """
    if name.lower().endswith(".shp"):
        raw, found = _read_shapefile(name, content, beside, crs)
    else:
        raw, found = _read_geojson(name, content)
    features: list[Feature] = []
    for where, properties, geometry in raw:
        read = _feature(name, where, properties, geometry, crs)
        if isinstance(read, Finding):
            found.append(read)
        else:
            features.append(read)
    if not raw and not found:
        found.append(finding(name, "empty"))
    return features, found


Raw = list[tuple[str, Mapping[str, Any], Any]]


def _read_geojson(name: str, content: bytes) -> tuple[Raw, list[Finding]]:
    text = decoded(content)
    if text is None:
        return [], [finding(name, "encoding")]
    try:
        read = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        return [], [finding(name, "unreadable", what=error)]
    features = read.get("features") if isinstance(read, dict) else None
    if not isinstance(features, list):
        return [], [finding(name, "no_features")]
    return [
        (f"{name} features[{number}]", one.get("properties") or {}, one.get("geometry"))
        for number, one in enumerate(features)
        if isinstance(one, dict)
    ], []


def _read_shapefile(name: str, content: bytes, beside: Mapping[str, bytes], crs: str) -> tuple[Raw, list[Finding]]:
    import shapefile  # noqa: PLC0415

    if ".dbf" not in beside:
        return [], [finding(name, "no_dbf", file=Path(name).with_suffix(".dbf").name)]
    if beside.get(".prj", b"").lstrip().upper().startswith(b"PROJCS") and not is_projected(crs):
        return [], [finding(name, "projected", crs=crs)]
    wrong = finding(name, "encoding")
    said = beside.get(".cpg", b"").decode("ascii", "replace").strip().lower()
    for encoding in dict.fromkeys(("gb18030" if "gb" in said or "936" in said else "utf-8", "utf-8", "gb18030")):
        try:
            with shapefile.Reader(shp=io.BytesIO(content), dbf=io.BytesIO(beside[".dbf"]), encoding=encoding) as reader:
                return [
                    (f"{name} #{number}", one.record.as_dict(), one.shape.__geo_interface__)
                    for number, one in enumerate(reader.iterShapeRecords(), 1)
                ], []
        except UnicodeDecodeError:
            continue
        except (shapefile.ShapefileException, ValueError, OSError, KeyError, IndexError, struct.error) as error:
            if "decode" not in str(error):  # the library says so in its own words where an attribute is not text
                wrong = finding(name, "unreadable", what=error)
    return [], [wrong]


def _feature(file: str, where: str, properties: Mapping[str, Any], geometry: Any, crs: str) -> Feature | Finding:
    facts = {_CUT.get(name, name): _text(value) for key, value in properties.items() if (name := str(key).lower())}
    said = facts.get("kind") or Path(file).stem
    kind = _KIND.get(plain(said), "")
    if not kind:
        return finding(where, "unknown_layer", kind=said, known=", ".join(KINDS))
    code = facts.get("code", "")
    if not code:
        return finding(where, "no_code")
    outline = _outline(where, kind, code, geometry, crs)
    return outline if isinstance(outline, Finding) else Feature(file, where, kind, code, facts, outline)


def _outline(where: str, kind: str, code: str, geometry: Any, crs: str) -> Any:
    """Return a feature's outline, or what is wrong with it."""
    wanted = LINES if kind == "road" else POLYGONS
    what = geometry.get("type") if isinstance(geometry, dict) else None
    if what not in wanted:
        return finding(where, "geometry", got=what, expected=" / ".join(sorted(wanted)))
    try:
        outline = shapely.force_2d(geometry_of(geometry))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, shapely.errors.ShapelyError) as error:
        return finding(where, "unreadable", what=error)
    outline = shapely.transform(outline, lambda xy: converted(xy, crs))
    wrong = place_problem(*_bounds(outline))
    if wrong:
        return finding(where, wrong, lon=f"{_bounds(outline)[0]:g}", lat=f"{_bounds(outline)[1]:g}")
    if not outline.is_valid:
        return finding(where, "self_crossing", code=code, what=explain_validity(outline))
    return outline


def converted(xy: F64, crs: str) -> F64:
    """Return coordinates as CGCS2000 degrees, to the millimetre."""
    lon, lat = to_cgcs2000(xy[:, 0], xy[:, 1], crs)
    return np.column_stack((np.round(lon, DECIMALS), np.round(lat, DECIMALS)))


def _bounds(outline: Any) -> tuple[float, float]:
    west, south, _, _ = outline.bounds if not outline.is_empty else (np.nan, np.nan, 0, 0)
    return float(west), float(south)


# China with its waters; a value outside it is a mistake in a sheet, not a place of a district.
LON, LAT = (73.0, 136.0), (3.0, 54.0)


def place_problem(lon: float, lat: float) -> str:
    """Return what is wrong with a place, as a finding's code, "" where it can be one."""
    if _within(lon, LON) and _within(lat, LAT):
        return ""
    if _within(lon, LAT) and _within(lat, LON):
        return "swapped"
    if not (np.isfinite(lon) and np.isfinite(lat)):
        return "no_place"
    return "metres" if abs(lon) > 360 or abs(lat) > 360 else "outside"


def _within(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


def geometry_text(outline: Any) -> str:
    """Return an outline as GeoJSON text."""
    return str(shapely.to_geojson(outline))


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()
