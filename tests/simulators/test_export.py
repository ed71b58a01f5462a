"""What `citybrain simulate --export` writes can be read back, and is the district."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openpyxl
import pytest
import shapefile
import shapely

from citybrain import cli
from citybrain.model import Area, Cell, Device, Gateway, Place, Road, Unit
from simulators.district import District, build
from simulators.export import contents, export
from simulators.world.sheets import ASSET_HEADER, KINDS, UNIT_HEADER

SQUARE_DEGREE_M2 = 111_320.0**2 * 0.855364  # at 31.2 degrees north


@pytest.fixture(scope="module")
def district() -> District:
    return build(11, "reference")


@pytest.fixture(scope="module")
def folder(district: District, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "city" / "lists"
    export(district, path)
    return path


def features(folder: Path, name: str) -> list[dict[str, Any]]:
    content = msgspec.json.decode((folder / f"{name}.geojson").read_bytes())
    assert content["type"] == "FeatureCollection"
    found: list[dict[str, Any]] = content["features"]
    return found


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / name).read_text("utf-8-sig"))))


def place(row: dict[str, str]) -> Place:
    assert row["坐标系"] == "CGCS2000"
    return Place(float(row["经度(°)"]), float(row["纬度(°)"]), row["单元网格"], row["地址"], row["道路编号"])


def layer(folder: Path, name: str) -> tuple[list[str], list[Any]]:
    found = features(folder, name)
    shapes = [shapely.from_geojson(msgspec.json.encode(feature["geometry"])) for feature in found]
    return [feature["properties"]["code"] for feature in found], shapes


def test_assets_read_back_are_the_registry_s(district: District, folder: Path) -> None:
    kinds = {zh: kind for kind, zh in KINDS.items()}
    metrics = {device.id: (device.metrics, device.event_metrics) for device in district.registry.devices}
    found = [
        Device(
            row["编号"],
            kinds[row["类型"]],
            row["网关"],
            place(row),
            *metrics[row["编号"]],  # the kind's, not the list's
            zone=row["压力分区"],
            building=row["楼宇"],
            name=row["名称"],
            tags=tuple(filter(None, row["标签"].split(";"))),
            sensor=row["传感器编号"],
            maintainer=row["维保单位"],
        )
        for row in table(folder, "assets.csv")
    ]
    assert tuple(found) == district.registry.devices


def test_the_workbook_has_a_sheet_a_kind_with_the_same_rows_as_the_table(folder: Path) -> None:
    book = openpyxl.load_workbook(folder / "assets.xlsx", read_only=True)
    assert book.sheetnames == list(KINDS.values())
    rows = []
    for sheet in book:
        header, *lines = sheet.iter_rows(values_only=True)
        assert header == ASSET_HEADER
        assert all(isinstance(line[0], str) and isinstance(line[5], float) for line in lines)
        rows += [["" if value is None else str(value) for value in line] for line in lines]
    in_table = [list(row.values()) for row in table(folder, "assets.csv")]
    assert sorted(rows) == sorted(in_table)


def test_gateways_and_units_read_back_are_the_registry_s(district: District, folder: Path) -> None:
    gateways = [Gateway(row["编号"], int(row["分片"]), place(row)) for row in table(folder, "gateways.csv")]
    assert tuple(gateways) == district.registry.gateways
    units = [Unit(*(row[name] for name in UNIT_HEADER)) for row in table(folder, "organisation.csv")]
    assert tuple(units) == district.registry.units


def test_areas_cells_and_roads_read_back_are_the_registry_s(district: District, folder: Path) -> None:
    layers = {name: features(folder, name) for name in ("streets", "workstations", "grids", "communities")}
    properties = [feature["properties"] for found in layers.values() for feature in found]
    areas = [Area(p["code"], p["kind"], p["name"], p["name_en"], p["parent"]) for p in properties]
    assert sorted(areas, key=lambda area: area.code) == sorted(district.registry.areas, key=lambda area: area.code)
    parent = {area.code: area.parent for area in areas}
    cells = []
    for feature in features(folder, "cells"):
        code, community = feature["properties"]["code"], feature["properties"]["parent"]
        grid = parent[community]
        cells.append(Cell(code, grid, parent[parent[grid]], parent[grid], community))
    assert tuple(cells) == district.registry.cells
    roads = [feature["properties"] for feature in features(folder, "roads")]
    assert district.registry.roads == tuple(
        Road(p["code"], p["name"], p["name_en"], p["level"], p["chief"]) for p in roads
    )


@pytest.mark.parametrize("name", ["streets", "workstations", "grids", "communities", "cells", "zones"])
def test_outlines_are_valid_and_cover_the_district_without_gap_or_overlap(folder: Path, name: str) -> None:
    _, shapes = layer(folder, name)
    assert all(shape.geom_type == "Polygon" and shape.is_valid for shape in shapes)
    assert all(shape.exterior.is_ccw for shape in shapes)
    assert shapely.coverage_is_valid(shapes)
    whole = shapely.coverage_union_all(shapes)
    assert whole.geom_type == "Polygon"
    assert not whole.interiors
    assert whole.area * SQUARE_DEGREE_M2 == pytest.approx(36e6, rel=1e-4)
    assert sum(shape.area for shape in shapes) == pytest.approx(whole.area, rel=1e-9)


def test_the_outline_of_an_area_is_that_of_what_it_is_made_of(folder: Path) -> None:
    for name in ("streets", "workstations", "grids", "communities"):
        below = {"streets": "workstations", "workstations": "grids", "grids": "communities", "communities": "cells"}[
            name
        ]
        parts = defaultdict(list)
        for feature in features(folder, below):
            parts[feature["properties"]["parent"]].append(shapely.geometry.shape(feature["geometry"]))
        codes, shapes = layer(folder, name)
        assert set(parts) == set(codes)
        for code, shape in zip(codes, shapes, strict=True):
            assert shapely.coverage_union_all(parts[code]).equals(shape)


def test_every_device_lies_within_the_outlines_that_its_cell_names(district: District, folder: Path) -> None:
    devices = district.registry.devices
    points = shapely.points([(device.place.lon, device.place.lat) for device in devices])
    zone_of = {code: zone for zone, codes in district.zone_cells.items() for code in codes}
    wanted = {
        "cells": [device.place.cell for device in devices],
        "communities": [district.cells[device.place.cell].community for device in devices],
        "grids": [district.cells[device.place.cell].grid for device in devices],
        "streets": [district.cells[device.place.cell].street for device in devices],
        "zones": [zone_of[device.place.cell] for device in devices],
    }
    for name, codes in wanted.items():
        known, shapes = layer(folder, name)
        found = np.full(len(devices), -1)
        of_point, of_shape = shapely.STRtree(shapes).query(points, predicate="within")
        found[of_point] = of_shape
        assert len(of_point) == len(devices), name
        assert [known[index] for index in found] == codes, name


def test_every_device_is_nearest_to_the_line_of_its_road(district: District, folder: Path) -> None:
    codes, lines = layer(folder, "roads")
    points = shapely.points([(device.place.lon, device.place.lat) for device in district.registry.devices])
    nearest = shapely.STRtree(lines).nearest(points)
    assert [codes[index] for index in nearest] == [device.place.road for device in district.registry.devices]


@pytest.mark.parametrize("name", ["streets", "workstations", "grids", "communities", "cells", "zones", "roads"])
def test_a_shapefile_says_what_its_geojson_says(folder: Path, name: str) -> None:
    assert (folder / "shapefile" / f"{name}.cpg").read_text() == "UTF-8"
    assert "2000" in (folder / "shapefile" / f"{name}.prj").read_text()
    _, shapes = layer(folder, name)
    with shapefile.Reader(str(folder / "shapefile" / name), encoding="utf-8") as reader:
        assert [record.as_dict() for record in reader.records()] == [
            feature["properties"] for feature in features(folder, name)
        ]
        for shape, wanted in zip(reader.shapes(), shapes, strict=True):
            assert shapely.geometry.shape(shape.__geo_interface__).equals(wanted)


def test_the_small_district_exports_what_it_has(tmp_path: Path) -> None:
    small = build(11)
    export(small, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.geojson")} == {"streets", "grids", "cells", "zones"}
    assert len(table(tmp_path, "assets.csv")) == 225
    for name in ("streets", "grids", "cells", "zones"):
        _, shapes = layer(tmp_path, name)
        assert shapely.coverage_is_valid(shapes)
        assert sum(shape.area for shape in shapes) * SQUARE_DEGREE_M2 == pytest.approx(3.3e6, rel=1e-4)


def test_the_command_exports_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["simulate", "--data", str(tmp_path), "--seed", "3", "--export", str(tmp_path / "x"), "--json"]) == 0
    )
    said = msgspec.json.decode(capsys.readouterr().out)
    assert said["assets"] == 225
    assert said["files"] == len([path for path in (tmp_path / "x").rglob("*") if path.is_file()])


def test_exporting_again_replaces_the_files_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    export(build(3), tmp_path)
    before = (tmp_path / "assets.csv").read_bytes()
    export(build(4), tmp_path)
    assert (tmp_path / "assets.csv").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.rglob(".*"))


def test_one_seed_gives_the_same_bytes_whenever_it_is_exported(district: District, folder: Path) -> None:
    dated = [path for path in folder.rglob("*") if path.suffix in (".xlsx", ".dbf")]
    assert len(dated) == 8
    again = dict(contents(build(11, "reference")))
    for path in folder.rglob("*.*"):
        assert again[str(path.relative_to(folder))] == path.read_bytes(), path
    book = zipfile.ZipFile(folder / "assets.xlsx")
    assert {part.date_time[0] for part in book.infolist()} == {1980}
    assert b"2000-01-01T00:00:00Z" in book.read("docProps/core.xml")
    with shapefile.Reader(str(folder / "shapefile" / "roads")) as reader:
        assert reader.dbf is not None
        reader.dbf.seek(1)
        assert reader.dbf.read(3) == bytes((100, 1, 1))


def test_an_export_onto_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert cli.main(["simulate", "--data", str(tmp_path), "--seed", "3", "--export", str(path)]) == 2
    assert f"--export {path}: this is a file; give a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_disk_that_refuses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shapefile").write_text("in the way")
    assert cli.main(["simulate", "--data", str(tmp_path), "--seed", "3", "--export", str(tmp_path)]) == 5
    assert str(tmp_path / "shapefile") in capsys.readouterr().err
