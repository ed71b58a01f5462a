"""An import: files become one change set of the ledger, or a list of what a clerk has to put right first.

Everything is read before anything is judged, so that layers, units and gateways of one import serve its assets whatever
the order of the files. A row that is there already, and the same, changes nothing: an import may be repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from api.assets.areas import Around, read_around
from api.assets.book import Book
from api.assets.changes import TABLES, Changes, applied, key_of, problems
from api.assets.coordinates import parse_crs
from api.assets.findings import Finding, errors, finding
from api.assets.layers import Feature, read_layer
from api.assets.rows import Assets, read_assets
from api.assets.sheets import Line, Sheet, read_sheets
from citybrain.errors import NotFound, UsageError

SHEETS = (".xlsx", ".csv")
LAYERS = (".geojson", ".json", ".shp")
BESIDE = (".dbf", ".prj", ".cpg", ".shx")
# Where a finding about a whole asset stands in its row.
FIELD = {
    "unknown_gateway": "gateway",
    "unknown_zone": "zone",
    "zone_split": "zone",
    "unknown_unit": "maintainer",
    "unknown_metric": "metrics",
    "sensor_taken": "sensor",
    "shard": "shard",
    "shard_moved": "shard",
}


class Source(msgspec.Struct, frozen=True):
    """A file: its name as messages give it, its content, and for a .shp those of the files beside it, by suffix."""

    name: str
    content: bytes
    beside: dict[str, bytes] = {}


class Result(msgspec.Struct, frozen=True):
    """What an import comes to: the change set where nothing is wrong, what was found, and how many rows of what."""

    changes: Changes
    findings: tuple[Finding, ...]
    counts: dict[str, dict[str, int]]

    @property
    def wrong(self) -> list[Finding]:
        """What keeps it out."""
        return errors(self.findings)


def sources_of(paths: Iterable[Path]) -> list[Source]:
    """Return the files of paths, of a folder those in it that can be imported; raises NotFound, UsageError."""
    found: list[Source] = []
    for path in paths:
        if not path.exists():
            raise NotFound(f"{path}: no such file or folder")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        usable = [one for one in inside if one.suffix.lower() in (*SHEETS, *LAYERS)]
        if not usable:
            raise UsageError(f"{path}: nothing to import; expected {', '.join((*SHEETS, *LAYERS))}")
        found += [Source(str(one.name), one.read_bytes(), _beside(one)) for one in usable]
    return found


def _beside(path: Path) -> dict[str, bytes]:
    if path.suffix.lower() != ".shp":
        return {}
    near = {one.suffix.lower(): one for one in path.parent.glob(f"{path.stem}.*") if one.suffix.lower() in BESIDE}
    return {suffix: one.read_bytes() for suffix, one in near.items()}


def read_import(
    sources: Sequence[Source], book: Book, *, crs: str, shards: Iterable[int], at_ms: int, reason: str = ""
) -> Result:
    """Read files against the ledger they are for; raises UsageError for a coordinate system nobody knows."""
    crs = parse_crs(crs)
    sheets, features, found = _read(sources, crs)
    around = read_around(features, [sheet for sheet in sheets if _is_units(sheet)], book)
    found += around.findings
    placed = [sheet for sheet in sheets if {"lon", "lat"} <= sheet.fields]
    others = [sheet for sheet in sheets if sheet not in placed and not _is_units(sheet)]
    found += [finding(sheet.where, "no_headers", names="经度, 纬度 / 部门") for sheet in others]
    assets = read_assets(placed, around, book, crs=crs, at_ms=at_ms, reason=reason)
    found += assets.findings
    changes = _differing(book, around, assets)
    if not errors(found):
        found += _located(problems(applied(book, changes), shards, book), assets.lines)
    return Result(changes, tuple(found), _counts(changes, around, assets))


def _read(sources: Sequence[Source], crs: str) -> tuple[list[Sheet], list[Feature], list[Finding]]:
    sheets: list[Sheet] = []
    features: list[Feature] = []
    found: list[Finding] = []
    for source in sources:
        if source.name.lower().endswith(SHEETS):
            read, wrong = read_sheets(source.name, source.content)
            sheets += read
        else:
            outlines, wrong = read_layer(source.name, source.content, crs, source.beside)
            features += outlines
        found += wrong
    return sheets, features, found


def _is_units(sheet: Sheet) -> bool:
    return "lon" not in sheet.fields and {"code", "name"} <= sheet.fields


def _differing(book: Book, around: Around, assets: Assets) -> Changes:
    """Return what is other than in the ledger."""
    rows: dict[str, Iterable[Any]] = {
        "assets": assets.assets,
        "gateways": assets.gateways,
        "units": around.units.values(),
        "areas": around.areas.values(),
        "zones": around.zones.values(),
        "cells": around.cells.values(),
        "roads": around.roads.values(),
        "shapes": around.shapes.values(),
    }
    changed = {
        table: tuple(row for row in own if getattr(book, table).get(key_of(row)) != row) for table, own in rows.items()
    }
    codes = {row.code for row in changed["assets"]} | {one.asset for one in assets.sensors}
    notes = tuple(note for note in assets.notes if note.asset in codes)
    return Changes(book.version, **changed, sensors=assets.sensors, notes=notes)


def _located(found: Iterable[Finding], lines: dict[str, Line]) -> list[Finding]:
    """Return findings about assets and gateways where their rows stand."""
    placed = []
    for one in found:
        line = lines.get(one.where)
        at = line.at(FIELD.get(one.code, "code")) if line is not None else one.where
        placed.append(msgspec.structs.replace(one, where=at))
    return placed


def _counts(changes: Changes, around: Around, assets: Assets) -> dict[str, dict[str, int]]:
    read = Counter(around.read) + Counter(assets.read)
    return {
        table: {"read": read[table], "changed": len(getattr(changes, table))}
        for table in TABLES
        if read[table] or getattr(changes, table)
    }
