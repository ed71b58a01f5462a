"""Coordinates: what comes in is brought to CGCS2000 degrees here, and nowhere else.

`wgs84`        taken as it is. Both systems hang on the ITRF; the ellipsoids differ by less than 0.2 mm, but CGCS2000
               is frozen at epoch 2000.0 while WGS-84 follows the plates: about 3 cm a year in eastern China, below 1 m
               until 2030 [M]. Accuracy class B of assets is 1 m (docs/domain.md), so no shift is applied.
`gcj02`        the offset of public maps, inverted by iteration: error <= 1e-6 degrees (0.1 m), tested at 1e-8.
`cgcs2000`     taken as it is.
`cgcs2000/3-degree-gk-ZONE`, `cgcs2000/3-degree-gk`
               metres of the 3-degree Gauss-Krueger projection (GB/T 22021), zone 25 to 45: by its number, or by the two
               digits that stand before the easting. EPSG:4513..4533 to EPSG:4490 by PROJ, error < 1 mm.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from citybrain.errors import UsageError

F64 = npt.NDArray[np.float64]

PLAIN = ("wgs84", "cgcs2000")
EXPECTED = "wgs84, gcj02, cgcs2000, cgcs2000/3-degree-gk or cgcs2000/3-degree-gk-ZONE (25 to 45)"
ERROR_DEG = 1e-6  # the error we state for GCJ-02; the iteration stops far below it
_GAUSS = re.compile(r"cgcs2000/3-degree-gk(?:-(?:zone)?-?(\d{2}))?(?:-zone)?")
_ZONES = range(25, 46)
_EPSG_BEFORE_ZONE = 4488  # EPSG:4513 is zone 25
# GCJ-02 as it is publicly known: Krassowsky's ellipsoid, and the box in which the offset is applied [M].
_AXIS_M, _ECCENTRICITY2 = 6_378_245.0, 0.00669342162296594323
_EARTH_M = 6_371_008.8  # mean radius (IUGG)
_BOX = (72.004, 137.8347, 0.8293, 55.8271)


def parse_crs(text: str) -> str:
    """Return a coordinate system's name in its one spelling; raises UsageError, naming all of them.

    >>> parse_crs("CGCS2000/3-degree-GK-zone-40")
    'cgcs2000/3-degree-gk-40'
    """
    name = text.strip().lower().replace("wgs-84", "wgs84").replace("gcj-02", "gcj02").replace(" ", "")
    if name in (*PLAIN, "gcj02"):
        return name
    match = _GAUSS.fullmatch(name)
    if match is None or (match[1] and int(match[1]) not in _ZONES):
        raise UsageError(f"coordinate system {text[:60]!r}: expected {EXPECTED}")
    return "cgcs2000/3-degree-gk" + (f"-{match[1]}" if match[1] else "")


def is_projected(crs: str) -> bool:
    """Return whether coordinates are metres, not degrees."""
    return "gk" in crs


def to_cgcs2000(lon: npt.ArrayLike, lat: npt.ArrayLike, crs: str) -> tuple[F64, F64]:
    """Return CGCS2000 degrees of coordinates in `crs` (degrees; metres east and north where it is projected).

    What is no place on earth comes out as it is, or as NaN: the caller says which row that was. Raises UsageError.
    """
    x, y = np.asarray(lon, np.float64), np.asarray(lat, np.float64)
    name = parse_crs(crs)
    if name in PLAIN:
        return x, y
    return gcj02_to_cgcs2000(x, y) if name == "gcj02" else _from_gauss(x, y, name)


def gcj02_to_cgcs2000(lon: F64, lat: F64) -> tuple[F64, F64]:
    """Return what GCJ-02 was made from: a fixed point, since the offset changes little over its own size."""
    x, y = lon.copy(), lat.copy()
    for _ in range(12):
        there_x, there_y = cgcs2000_to_gcj02(x, y)
        step_x, step_y = lon - there_x, lat - there_y
        x, y = x + step_x, y + step_y
        if not (np.abs(step_x) > 1e-10).any() and not (np.abs(step_y) > 1e-10).any():
            break
    return x, y


def cgcs2000_to_gcj02(lon: F64, lat: F64) -> tuple[F64, F64]:
    """Return coordinates with the offset of public maps; outside its box nothing is added."""
    west, east, south, north = _BOX
    inside = (lon > west) & (lon < east) & (lat > south) & (lat < north)
    with np.errstate(invalid="ignore"):
        east_m, north_m = _offset(lon - 105.0, lat - 35.0)
        phi = lat / 180.0 * math.pi
        magic = 1.0 - _ECCENTRICITY2 * np.sin(phi) ** 2
        d_lat = north_m * 180.0 / (_AXIS_M * (1.0 - _ECCENTRICITY2) / (magic * np.sqrt(magic)) * math.pi)
        d_lon = east_m * 180.0 / (_AXIS_M / np.sqrt(magic) * np.cos(phi) * math.pi)
    return np.where(inside, lon + d_lon, lon), np.where(inside, lat + d_lat, lat)


def _offset(x: F64, y: F64) -> tuple[F64, F64]:
    """Return the offset (east, north) in metres, at degrees from 105 E, 35 N."""
    root = np.sqrt(np.abs(x))
    waves = (20.0 * np.sin(6.0 * math.pi * x) + 20.0 * np.sin(2.0 * math.pi * x)) * 2.0 / 3.0
    east = 300.0 + x + 2.0 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * root + waves
    east = east + (20.0 * np.sin(math.pi * x) + 40.0 * np.sin(math.pi / 3.0 * x)) * 2.0 / 3.0
    east = east + (150.0 * np.sin(math.pi / 12.0 * x) + 300.0 * np.sin(math.pi / 30.0 * x)) * 2.0 / 3.0
    north = -100.0 + 2.0 * x + 3.0 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * root + waves
    north = north + (20.0 * np.sin(math.pi * y) + 40.0 * np.sin(math.pi / 3.0 * y)) * 2.0 / 3.0
    return east, north + (160.0 * np.sin(math.pi / 12.0 * y) + 320.0 * np.sin(math.pi / 30.0 * y)) * 2.0 / 3.0


def distance_m(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return the metres between two places (longitude, latitude in degrees) on a sphere; error below 0.6 % [M].

    >>> round(distance_m((121.4737, 31.2304), (121.4737, 31.2314)))
    111
    """
    (lon, lat), (lon2, lat2) = ((math.radians(x), math.radians(y)) for x, y in (one, other))
    half = math.sin((lat2 - lat) / 2) ** 2 + math.cos(lat) * math.cos(lat2) * math.sin((lon2 - lon) / 2) ** 2
    return 2 * _EARTH_M * math.asin(math.sqrt(min(half, 1.0)))


@lru_cache(maxsize=32)
def _transformer(zone: int, back: bool) -> Any:
    from pyproj import Transformer  # noqa: PLC0415  reading its database takes a while, and few sheets are projected

    projected, geographic = _EPSG_BEFORE_ZONE + zone, 4490
    ends = (geographic, projected) if back else (projected, geographic)
    return Transformer.from_crs(ends[0], ends[1], always_xy=True)


def _from_gauss(east: F64, north: F64, crs: str) -> tuple[F64, F64]:
    prefix = np.where(np.isfinite(east), east // 1e6, 0).astype(np.int64)
    named = crs.rpartition("-")[2]
    zones = np.where(prefix == 0, int(named), prefix) if named.isdecimal() else prefix
    lon, lat = np.full(east.shape, np.nan), np.full(north.shape, np.nan)
    for zone in sorted(set(np.atleast_1d(zones).tolist()) & set(_ZONES)):
        mine = zones == zone
        lon[mine], lat[mine] = _transformer(zone, back=False).transform(east[mine] % 1e6 + zone * 1e6, north[mine])
    return np.where(np.isinf(lon), np.nan, lon), np.where(np.isinf(lat), np.nan, lat)


def to_gauss(lon: F64, lat: F64, zone: int) -> tuple[F64, F64]:
    """Return metres (east with the zone's digits before it, north) of CGCS2000 degrees; zone 25 to 45."""
    east, north = _transformer(zone, back=True).transform(lon, lat)
    return np.asarray(east), np.asarray(north)
