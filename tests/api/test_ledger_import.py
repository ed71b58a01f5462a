"""Imports: a good one makes the ledger it describes, a bad one says where and what, and changes nothing."""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openpyxl
import pytest
import shapefile
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from api.assets.book import Book, registry_of
from api.assets.changes import applied
from api.assets.coordinates import cgcs2000_to_gcj02, to_gauss
from api.assets.findings import Finding, report
from api.assets.importing import Result, Source, read_import, sources_of
from api.assets.sheets import column_number, letters
from citybrain.errors import NotFound, UsageError
from citybrain.i18n import catalogue
from citybrain.model import Gateway, Place, Unit
from simulators.district import build
from simulators.export import export

AT = 1_795_536_000_000
HEADER = ("编号", "类型", "名称", "传感器编号", "网关", "经度(°)", "纬度(°)", "压力分区", "维保单位", "街道")
ROW = ("hyd-1", "消火栓", "一号栓", "imei-1", "gw-0", "120.001", "31.001", "z1", "水务", "甲街道")
LIFT = ("lift-1", "电梯", "一号梯", "", "gw-0", "120.003", "31.001", "", "", "001")


def features(*found: tuple[dict[str, Any], Any]) -> bytes:
    return json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "properties": properties, "geometry": json.loads(shapely.to_geojson(outline))}
                for properties, outline in found
            ],
        },
        ensure_ascii=False,
    ).encode()


STREET = ({"code": "001", "name": "甲街道", "kind": "street"}, shapely.box(120.0, 31.0, 120.01, 31.01))
GRID = ({"code": "g1", "name": "一网格", "kind": "grid", "parent": ""}, shapely.box(120.0, 31.0, 120.01, 31.01))
CELLS = [
    ({"code": f"c{n}", "kind": "cell"}, shapely.box(120.0 + n / 500, 31.0, 120.0 + (n + 1) / 500, 31.01))
    for n in range(5)
]
ZONE = ({"code": "z1", "name": "一区", "kind": "zone"}, shapely.box(120.0, 31.0, 120.01, 31.01))
ROAD = ({"code": "r1", "name": "青禾路", "kind": "road", "level": 1, "chief": "王"},
        shapely.LineString([(120.0, 31.0011), (120.01, 31.0011)]))  # fmt: skip
LAYERS = Source("layers.geojson", features(STREET, GRID, *CELLS, ZONE, ROAD))
UNITS = Source("organisation.csv", "编号,名称,部门\nwater,水务,\n".encode())
GATEWAYS = Source("gateways.csv", "编号,分片,经度,纬度\ngw-0,0,120.0025,31.002\n".encode("gbk"))
AROUND = (LAYERS, UNITS, GATEWAYS)


def table(*rows: Sequence[str], header: Sequence[str] = HEADER) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([header, *rows])
    return out.getvalue().encode("utf-8-sig")


def workbook(sheets: dict[str, list[Sequence[Any]]], change: Callable[[Any], None] = lambda book: None) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        page = book.create_sheet(name)
        for row in rows:
            page.append(list(row))
    change(book)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def read(*sources: Source, book: Book | None = None, crs: str = "cgcs2000") -> Result:
    return read_import(sources, book or Book(), crs=crs, shards=(0, 1), at_ms=AT, reason="survey")


def assets(content: bytes, name: str = "assets.csv", **more: Any) -> Result:
    return read(*AROUND, Source(name, content), **more)


def changed(row: Sequence[str], **values: str) -> tuple[str, ...]:
    names = [name.partition("(")[0] for name in HEADER]
    return tuple(values.get(name, old) for name, old in zip(names, row, strict=True))


# --- what is right ------------------------------------------------------------------------------------------------


def test_a_row_becomes_an_asset_with_its_place_found() -> None:
    result = assets(table(ROW, LIFT))
    assert result.findings == ()
    book = applied(Book(), result.changes)
    hydrant = book.assets["hyd-1"]
    assert (hydrant.kind, hydrant.state, hydrant.gateway, hydrant.zone, hydrant.maintainer) == (
        "hydrant", "active", "gw-0", "z1", "water")  # fmt: skip
    assert hydrant.place == Place(120.001, 31.001, "c0", "", "r1")
    assert (book.sensor_of("hyd-1"), book.sensor_of("lift-1")) == ("imei-1", "lift-1")
    assert {cell.street for cell in book.cells.values()} == {"001"}
    registry = registry_of(book)
    assert [device.id for device in registry.devices] == ["gw-0", "hyd-1", "lift-1"]
    assert {device.id: device.sensor for device in registry.devices} == {"gw-0": "", "hyd-1": "imei-1", "lift-1": ""}
    assert registry.gateways == (Gateway("gw-0", 0, Place(120.0025, 31.002, "c1", "", "")),)
    assert registry.units == (Unit("water", "水务", ""),)
    assert result.counts["assets"] == {"read": 3, "changed": 3}


def test_again_it_changes_nothing_and_a_changed_row_changes_that() -> None:
    book = applied(Book(), assets(table(ROW, LIFT)).changes)
    assert assets(table(ROW, LIFT), book=book).changes.counts == {}
    assert assets(table(LIFT), book=book).changes.counts == {}, "what is not in the sheet stays"
    result = assets(table(changed(ROW, 名称="东门", 传感器编号="imei-2"), LIFT), book=book)
    assert result.changes.counts == {"assets": 1, "sensors": 2}
    after = applied(book, result.changes)
    assert [(one.id, one.removed_at) for one in after.sensors["hyd-1"]] == [("imei-1", AT), ("imei-2", None)]
    assert [(note.asset, note.moved.event) for note in result.changes.notes] == [("hyd-1", "replace")]


def test_english_headers_a_title_row_and_several_sheets() -> None:
    header = ["Code", "Name", "Sensor ID", "Gateway", "Longitude", "Latitude", "State", "水压（MPa）"]
    hydrant = ["hyd-1", "x", 867700000000001.0, "gw-0", 120.001, 31.001, "planned", 0.3]
    pages: dict[str, list[Sequence[Any]]] = {
        "hydrant": [["District assets 2026"], header, hydrant],
        "电梯": [["编号", "网关", "经度", "纬度", "备注"], ["lift-1", "gw-0", 120.003, 31.001, "new"]],
        "Sheet3": [],
    }  # fmt: skip
    result = assets(workbook(pages, lambda book: book["hydrant"].merge_cells("A1:G1")), "assets.xlsx")
    assert [(one.where, one.code, one.level) for one in result.findings] == [
        ("assets.xlsx 电梯!E1", "unknown_column", "warning"), ("assets.xlsx Sheet3", "empty", "warning")]  # fmt: skip
    book = applied(Book(), result.changes)
    assert (book.assets["hyd-1"].state, book.assets["hyd-1"].nominal) == ("planned", {"pressure_mpa": 0.3})
    assert book.assets["lift-1"].kind == "elevator"
    assert book.sensor_of("hyd-1") == "867700000000001"
    assert [device.id for device in registry_of(book).devices] == ["gw-0", "lift-1"], "planned is not provisioned"


@pytest.mark.parametrize("crs", ["gcj02", "cgcs2000/3-degree-gk"])
def test_coordinates_of_other_systems_land_where_they_belong(crs: str) -> None:
    lon, lat = np.array([120.001]), np.array([31.001])
    x, y = cgcs2000_to_gcj02(lon, lat) if crs == "gcj02" else to_gauss(lon, lat, 40)
    row = (*changed(ROW, 经度=repr(float(x[0])), 纬度=repr(float(y[0]))), crs)
    result = assets(table(row, header=(*HEADER, "坐标系")))
    assert result.findings == ()
    place = applied(Book(), result.changes).assets["hyd-1"].place
    assert (place.lon, place.lat) == pytest.approx((120.001, 31.001), abs=1e-6)
    assert place.cell == "c0"


# --- what is wrong ------------------------------------------------------------------------------------------------

BAD: list[tuple[str, bytes, str, str]] = [
    ("duplicate codes", table(ROW, changed(ROW, 名称="x")), "duplicate_code", "assets.csv!A3"),
    ("a device in two places", table(ROW, changed(ROW, 经度="120.005")), "two_places", "assets.csv!A3"),
    ("swapped", table(changed(ROW, 经度="31.001", 纬度="120.001")), "swapped", "assets.csv!F2"),
    ("metres", table(changed(ROW, 经度="404500.1", 纬度="3432100.2")), "metres", "assets.csv!F2"),
    ("not in China", table(changed(ROW, 经度="2.35", 纬度="48.85")), "outside", "assets.csv!F2"),
    ("outside the district", table(changed(ROW, 经度="121.0")), "outside_district", "assets.csv!F2"),
    ("no number", table(changed(ROW, 经度="120°0'")), "not_a_number", "assets.csv!F2"),
    ("no code", table(changed(ROW, 编号="")), "no_code", "assets.csv!A2"),
    ("unknown gateway", table(changed(ROW, 网关="gw-9")), "unknown_gateway", "assets.csv!E2"),
    ("unknown zone", table(changed(ROW, 压力分区="z9")), "unknown_zone", "assets.csv!H2"),
    ("unknown unit", table(changed(ROW, 维保单位="谁")), "unknown_unit", "assets.csv!I2"),
    ("unknown kind", table(changed(ROW, 类型="路灯")), "unknown_kind", "assets.csv!B2"),
    ("another street", table(changed(ROW, 街道="乙街道")), "elsewhere", "assets.csv!J2"),
    ("a sensor twice", table(ROW, changed(LIFT, 传感器编号="imei-1")), "sensor_taken", "assets.csv!D3"),
    ("no headers", b"a,b\n1,2\n", "no_headers", "assets.csv"),
    ("empty", b"", "empty", "assets.csv"),
    ("only headers", table(), "empty", "assets.csv"),
    ("wrong encoding", "编号,类型\n".encode("utf-16"), "encoding", "assets.csv"),
    ("not text", b"\xff\xfe\x81\x00\x00", "encoding", "assets.csv"),
    ("bar", table((*ROW, "3"), header=(*HEADER, "水压(bar)")), "wrong_unit", "assets.csv!K1"),
    ("kPa in a MPa column", table((*ROW, "300"), header=(*HEADER, "水压(MPa)")), "out_of_range", "assets.csv!K2"),
    ("pressure_kpa", table((*ROW, "300"), header=(*HEADER, "pressure_kpa")), "wrong_unit", "assets.csv!K1"),
    ("metric", table((*ROW, "pressure_kpa"), header=(*HEADER, "指标")), "unknown_metric", "assets.csv!K2"),
    ("system", table((*ROW, "bd09"), header=(*HEADER, "坐标系")), "unknown_crs", "assets.csv!K2"),
    ("state", table((*ROW, "消失"), header=(*HEADER, "状态")), "unknown_state", "assets.csv!K2"),
    ("road", table((*ROW, "无名路"), header=(*HEADER, "道路")), "unknown_road", "assets.csv!K2"),
    ("cell", table((*ROW, "c4"), header=(*HEADER, "单元网格")), "elsewhere", "assets.csv!K2"),
    ("column twice", table((*ROW, "x"), header=(*HEADER, "code")), "column_twice", "assets.csv!K1"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "code", "where"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_bad_sheet_is_told_by_cell_and_keeps_everything_out(content: bytes, code: str, where: str) -> None:
    result = assets(content)
    assert (code, where) in [(one.code, one.where) for one in result.wrong], result.wrong
    for one in result.wrong:
        assert one.told("zh")
        assert one.told("en")


def test_a_sheet_with_merged_cells_and_a_broken_workbook() -> None:
    content = workbook({"消火栓": [HEADER, ROW, ROW]}, lambda book: book["消火栓"].merge_cells("A2:A3"))
    found = assets(content, "assets.xlsx").wrong
    assert ("merged", "assets.xlsx 消火栓!A2:A3") in [(one.code, one.where) for one in found]
    assert [one.code for one in assets(content[:200], "assets.xlsx").wrong] == ["unreadable"]
    assert [one.code for one in assets(workbook({"Sheet": []}), "assets.xlsx").wrong] == ["empty"]


def test_all_mistakes_are_told_at_once_and_as_csv() -> None:
    rows = [changed(ROW, 编号=f"h{n}", 传感器编号=f"s{n}", 经度="31.0", 纬度="120.0") for n in range(30)]
    found = assets(table(*rows, changed(ROW, 网关="gw-9"))).findings
    assert len(found) == 30  # the last is judged when the rest is right
    told = list(csv.DictReader(io.StringIO(report(found).removeprefix("\ufeff"))))
    assert told[0] == {
        "where": "assets.csv!F2",
        "level": "error",
        "code": "swapped",
        "zh": "经度 31.0、纬度 120.0 填反了",
        "en": "longitude 31.0 and latitude 120.0 are swapped",
    }
    assert len(told) == 30


CROSSING = shapely.Polygon([(120.0, 31.0), (120.01, 31.01), (120.01, 31.0), (120.0, 31.01)])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (features((STREET[0], CROSSING)), "self_crossing"),
        (features(STREET, STREET), "duplicate_code"),
        (features(({"name": "x", "kind": "street"}, STREET[1])), "no_code"),
        (features(({"code": "1", "kind": "galaxy"}, STREET[1])), "unknown_layer"),
        (features(({"code": "1", "kind": "road"}, STREET[1])), "geometry"),
        (features(({"code": "1", "kind": "road", "level": 7}, ROAD[1])), "road_level"),
        (features(({"code": "w", "kind": "workstation", "parent": "nowhere"}, STREET[1])), "unknown_parent"),
        (features((STREET[0], shapely.box(31.0, 120.0, 31.01, 120.01))), "swapped"),
        (features((STREET[0], shapely.box(404500, 3432100, 404600, 3432200))), "metres"),
        (b'{"type": "FeatureCollection", "features": []}', "empty"),
        (b'{"type": "Feature"}', "no_features"),
        (b"{not json", "unread"),
        (b'{"features": [{"properties": {"code": "1", "kind": "cell"}, "geometry": {"type": "Polygon"}}]}', "unread"),
        (b'{"features": [{"properties": {"code": "1", "kind": "cell"}, "geometry": null}]}', "geometry"),
        ('{"features": "街道"}'.encode("utf-16"), "encoding"),
    ],
)  # fmt: skip
def test_a_bad_layer_is_told(content: bytes, code: str) -> None:
    result = read(Source("streets.geojson", content))
    assert code in [one.code.removesuffix("able") for one in result.wrong], result.findings
    assert all(one.where.startswith("streets.geojson") for one in result.wrong)


def shape_files(name: str, encoding: str = "utf-8", prj: bytes = b"GEOGCS[]") -> Source:
    shp, shx, dbf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with shapefile.Writer(shp=shp, shx=shx, dbf=dbf, encoding=encoding) as writer:
        writer.field("code", "C", size=20)
        writer.field("name", "C", size=60)
        writer.shape(STREET[1].__geo_interface__)
        writer.record(code="001", name="甲街道")
    return Source(name, shp.getvalue(), {".dbf": dbf.getvalue(), ".prj": prj})


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_a_shapefile_is_read_in_either_encoding(encoding: str) -> None:
    result = read(shape_files("街道.shp", encoding))
    assert result.findings == ()
    assert [(area.code, area.zh) for area in result.changes.areas] == [("001", "甲街道")]


@pytest.mark.filterwarnings("ignore:Declared file size")
def test_a_bad_shapefile_is_told() -> None:
    whole = shape_files("streets.shp")
    for source, code in (
        (msgspec.structs.replace(whole, beside={}), "no_dbf"),
        (msgspec.structs.replace(whole, content=whole.content[:150]), "unreadable"),
        (msgspec.structs.replace(whole, content=b"junk"), "unreadable"),
        (shape_files("streets.shp", prj=b'PROJCS["CGCS2000_3_Degree_GK_Zone_40"]'), "projected"),
    ):
        assert [one.code for one in read(source).wrong] == [code]


CELL = st.one_of(st.sampled_from([*HEADER, *ROW, *LIFT, "", "x"]), st.text(max_size=6), st.floats().map(str))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CELL, max_size=12), max_size=6), st.sampled_from(["assets.csv", "gateways.csv", "units.csv"]))
def test_whatever_stands_in_a_sheet_it_is_read_or_told(rows: list[list[str]], name: str) -> None:
    content = table(*rows, header=HEADER if name == "assets.csv" else rows[0] if rows else ())
    result = read(*AROUND, Source(name, content))
    assert all(one.told("zh") and one.told("en") for one in result.findings)
    if not result.wrong:
        registry_of(applied(Book(), result.changes))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["a.csv", "a.xlsx", "streets.geojson", "streets.shp"]))
def test_whatever_a_file_is_it_is_told(content: bytes, name: str) -> None:
    assert read(Source(name, content, {".dbf": content})).wrong


def test_paths_that_lead_nowhere_are_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        sources_of([tmp_path / "missing.xlsx"])
    with pytest.raises(UsageError, match="nothing to import"):
        sources_of([tmp_path])
    with pytest.raises(UsageError, match="expected wgs84"):
        read(LAYERS, crs="bd09")


def test_an_asset_that_walked_is_worth_a_look_only() -> None:
    book = applied(Book(), assets(table(ROW)).changes)
    result = assets(table(changed(ROW, 经度="120.009")), book=book)
    assert result.findings == (Finding("assets.csv!F2", "moved", {"code": "hyd-1", "metres": "763"}, "warning"),)
    assert result.changes.counts == {"assets": 1}


def test_every_finding_has_its_words_and_its_line_in_the_page() -> None:
    root = Path(__file__).parents[2]
    used = {"swapped", "metres", "outside", "no_place", "two_places", "duplicate_code"}  # chosen where they are made
    for path in (root / "api" / "assets").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("finding", "warning"):
                given = node.args[1]
                used |= {str(given.value)} if isinstance(given, ast.Constant) else set()
    texts = {key.removeprefix("import."): text for key, text in catalogue().items() if key.startswith("import.")}
    assert used == set(texts)
    page = (root / "docs" / "ledger.md").read_text(encoding="utf-8")
    for name, text in texts.items():
        assert f"| `{name}` | {text.en} |" in page


def test_columns_count_as_a_spreadsheet_does() -> None:
    assert [column_number(letters(n)) for n in range(1000)] == list(range(1000))


# --- the whole district -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "shapefile"])
def test_the_exported_district_comes_back_as_it_was_provisioned(tmp_path: Path, part: str) -> None:
    district = build(7, "reference")
    export(district, tmp_path)
    paths = [tmp_path] if not part else [tmp_path / part, *(tmp_path / f"{n}.csv" for n in NAMES)]
    result = read_import(sources_of(paths), Book(), crs="cgcs2000", shards=range(4), at_ms=AT)
    assert result.findings == ()
    made, wanted = registry_of(applied(Book(), result.changes)), district.registry
    for name in ("gateways", "devices", "cells", "units", "areas", "roads"):
        assert sorted(getattr(made, name), key=_key) == sorted(getattr(wanted, name), key=_key), name


NAMES = ("assets", "gateways", "organisation")


def _key(thing: Any) -> str:
    return f"{getattr(thing, 'kind', '')} {getattr(thing, 'id', '') or getattr(thing, 'code', '')}"
