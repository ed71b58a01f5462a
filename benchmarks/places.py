"""How many places are looked up in a second on one core: cell, areas, road and chief of random points of a district.

`python -m benchmarks.places --json` → lookups_per_s, cells, errors. The district is 6 km by 6 km of 100 m cells in 274
communities, 246 roads; errors are points whose cell, found anew by arithmetic, is another one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import msgspec
import numpy as np
import shapely

from api.cases.lookup import METRES_PER_DEGREE, Lookup
from citybrain.model import Area, Cell, Road

ORIGIN_LON, ORIGIN_LAT = 120.0, 31.0  # invented: no real neighbourhood is meant
SIDE, CELL_M = 60, 100.0
COMMUNITIES, ROADS = 274, 246


def make(seed: int) -> tuple[Lookup, dict[str, Cell]]:
    """Return a district's lookup: cells, communities as runs of cells, roads as polylines of up to 2 km."""
    rng = np.random.default_rng(seed)
    per_m = np.array([1 / (METRES_PER_DEGREE * math.cos(math.radians(ORIGIN_LAT))), 1 / METRES_PER_DEGREE])
    origin = np.array([ORIGIN_LON, ORIGIN_LAT])
    cells: dict[str, Cell] = {}
    outlines: dict[str, Any] = {}
    for row in range(SIDE):
        for column in range(SIDE):
            number = row * SIDE + column
            community = number * COMMUNITIES // (SIDE * SIDE)
            code = f"990101{community % 14 + 1:03d}{community:03d}{number % 1000:03d}"
            code = code if code not in cells else f"{code}x{number}"
            grid = f"g{community * 85 // COMMUNITIES}"
            cells[code] = Cell(code, grid, f"{community % 14 + 1:03d}", f"w{community % 32}", f"c{community}")
            low = origin + np.array([column, row]) * CELL_M * per_m
            high = origin + np.array([column + 1, row + 1]) * CELL_M * per_m
            outlines[f"cell:{code}"] = shapely.box(*low, *high)
    roads = {f"r{n}": Road(f"r{n}", f"路{n}", chief=f"chief {n}") for n in range(ROADS)}
    for code in roads:
        start, angle = rng.uniform(0, SIDE * CELL_M, 2), rng.uniform(0, math.tau)
        steps = np.arange(21)[:, None] * 100.0 * np.array([math.cos(angle), math.sin(angle)])
        outlines[f"road:{code}"] = shapely.linestrings(origin + (start + steps) * per_m)
    areas = {f"community:c{n}": Area(f"c{n}", "community", f"居委{n}") for n in range(COMMUNITIES)}
    return Lookup(cells, areas, roads, outlines), cells


def main() -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    lookup, cells = make(args.seed)
    rng = np.random.default_rng(args.seed)
    metres = rng.uniform(0, SIDE * CELL_M, (args.points, 2))
    lon = ORIGIN_LON + metres[:, 0] / (METRES_PER_DEGREE * math.cos(math.radians(ORIGIN_LAT)))
    lat = ORIGIN_LAT + metres[:, 1] / METRES_PER_DEGREE
    lookup.find(lon[:1000], lat[:1000])
    began, cpu = time.perf_counter(), time.process_time()
    found = lookup.find(lon, lat)
    took, used = time.perf_counter() - began, time.process_time() - cpu
    number = (metres // CELL_M).astype(int)
    expected = np.array(list(cells))[number[:, 1] * SIDE + number[:, 0]]
    result = {
        "lookups_per_s": round(args.points / took),
        "lookups_per_cpu_s": round(args.points / used),
        "cells": len(cells),
        "errors": int(np.count_nonzero(found.cell != expected)),
        "with_road": int(np.count_nonzero(found.road != "")),
    }
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n" if args.json else f"{result}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
