"""`citybrain simulate --export DIR`: the district as the lists and map layers that a city hands to an importer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from citybrain.errors import UsageError
from citybrain.storage import OS_FILES
from simulators.world import layers, sheets
from simulators.world.city import District


def contents(district: District) -> Iterator[tuple[str, bytes]]:
    """Yield each file of an export: its path within the folder, and its bytes."""
    registry = district.registry
    yield "assets.xlsx", sheets.assets_xlsx(registry.devices)
    yield "assets.csv", sheets.assets_csv(registry.devices)
    yield "gateways.csv", sheets.gateways_csv(registry.gateways)
    yield "organisation.csv", sheets.organisation_csv(registry.units)
    for name, features in layers.layers(district).items():
        yield f"{name}.geojson", layers.geojson(features)
        for suffix, content in layers.shapefiles(features).items():
            yield f"shapefile/{name}{suffix}", content


def export(district: District, folder: Path) -> dict[str, object]:
    """Write the district's lists and layers into a folder, each file whole or not at all; return what was written.

    Files of the same name are replaced. Raises UsageError where `folder` is a file, StorageError.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--export {folder}: this is a file; give a folder")
    for part in (folder, folder / "shapefile"):
        OS_FILES.make(part)
    written = []
    for name, content in contents(district):
        OS_FILES.replace(folder / name, content)
        written.append(name)
    registry = district.registry
    return {
        "folder": str(folder),
        "files": len(written),
        "assets": len(registry.devices),
        "gateways": len(registry.gateways),
        "units": len(registry.units),
        "areas": len(registry.areas),
        "cells": len(registry.cells),
        "roads": len(registry.roads),
    }
