"""Coordinates come in right, places are found right: against arithmetic, and round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from api.assets import coordinates
from api.assets.coordinates import ERROR_DEG, cgcs2000_to_gcj02, parse_crs, to_cgcs2000, to_gauss
from api.cases.lookup import METRES_PER_DEGREE, ROAD_REACH_M, Lookup
from api.cases.places import Atlas
from benchmarks.places import make
from citybrain.errors import UsageError
from citybrain.model import Area, Cell, Device, Place, Registry, Road, Unit
from simulators.district import build

LON = st.floats(74.0, 134.9)
LAT = st.floats(4.0, 53.9)


# --- coordinates --------------------------------------------------------------------------------------------------


@given(LON, LAT)
def test_gcj02_there_and_back_is_where_it_was(lon: float, lat: float) -> None:
    there = cgcs2000_to_gcj02(np.array([lon]), np.array([lat]))
    back = to_cgcs2000(*there, "gcj02")
    assert max(abs(back[0][0] - lon), abs(back[1][0] - lat)) < 1e-8 < ERROR_DEG
    moved_m = math.hypot((there[0][0] - lon) * math.cos(math.radians(lat)), there[1][0] - lat) * METRES_PER_DEGREE
    assert 10 < moved_m < 2000


def test_gcj02_is_the_offset_that_is_publicly_known() -> None:
    # Tian'anmen as public maps and as satellites have it: published pairs agree to about 1e-5 degrees [M].
    lon, lat = cgcs2000_to_gcj02(np.array([116.391349]), np.array([39.907375]))
    assert (lon[0], lat[0]) == pytest.approx((116.397593, 39.908776), abs=2e-5)
    outside = cgcs2000_to_gcj02(np.array([2.35]), np.array([48.85]))
    assert (outside[0][0], outside[1][0]) == (2.35, 48.85)


@given(LON, LAT, st.sampled_from(["prefix", "zone"]))
def test_gauss_there_and_back_is_where_it_was(lon: float, lat: float, how: str) -> None:
    zone = min(max(round(lon / 3), 25), 45)
    east, north = to_gauss(np.array([lon]), np.array([lat]), zone)
    assert east[0] // 1e6 == zone
    if how == "zone":
        back = to_cgcs2000(east - zone * 1e6, north, f"cgcs2000/3-degree-gk-{zone}")
    else:
        back = to_cgcs2000(east, north, "cgcs2000/3-degree-gk")
    assert max(abs(back[0][0] - lon), abs(back[1][0] - lat)) < 1e-8


def test_the_middle_of_a_zone_is_at_half_a_million_metres() -> None:
    east, north = to_gauss(np.array([120.0]), np.array([0.0]), 40)
    assert (east[0], north[0]) == pytest.approx((40_500_000.0, 0.0), abs=1e-3)


def test_systems_have_one_spelling_and_others_are_refused() -> None:
    assert parse_crs(" WGS-84 ") == "wgs84"
    assert parse_crs("CGCS2000/3-degree-GK-zone-40") == "cgcs2000/3-degree-gk-40"
    assert parse_crs("cgcs2000/3-degree-gk-zone") == "cgcs2000/3-degree-gk"
    for text in ("bd09", "cgcs2000/3-degree-gk-60", ""):
        with pytest.raises(UsageError, match="expected wgs84"):
            parse_crs(text)


def test_what_is_no_place_comes_out_as_none() -> None:
    lon, lat = to_cgcs2000([500_000.0, math.nan], [3_400_000.0, 1.0], "cgcs2000/3-degree-gk")
    assert np.isnan(lon).all()
    assert np.isnan(lat).all()
    assert coordinates.is_projected("cgcs2000/3-degree-gk")


# --- lookup -------------------------------------------------------------------------------------------------------


def test_every_point_is_found_in_the_cell_that_arithmetic_says() -> None:
    lookup, cells = make(3)
    rng = np.random.default_rng(3)
    metres = rng.uniform(0, 6000, (5000, 2))
    lon = 120.0 + metres[:, 0] / (METRES_PER_DEGREE * math.cos(math.radians(31.0)))
    lat = 31.0 + metres[:, 1] / METRES_PER_DEGREE
    found = lookup.find(lon, lat)
    number = (metres // 100).astype(int)
    expected = [cells[code] for code in np.array(list(cells))[number[:, 1] * 60 + number[:, 0]]]
    assert found.cell.tolist() == [cell.code for cell in expected]
    assert found.grid.tolist() == [cell.grid for cell in expected]
    assert found.street.tolist() == [cell.street for cell in expected]
    assert found.community.tolist() == [cell.community for cell in expected]


def test_the_nearest_road_is_that_of_a_plain_search() -> None:
    lookup, _ = make(4)
    rng = np.random.default_rng(4)
    lon, lat = rng.uniform(120.0, 120.06, 300), rng.uniform(31.0, 31.05, 300)
    found = lookup.find(lon, lat)
    lines = lookup._roads._tree.geometries
    xy = lookup._to_plane(np.column_stack((lon, lat)))
    away = shapely.distance(shapely.points(xy)[:, None], lines[None, :])
    for n, code in enumerate(found.road):
        if away[n].min() > ROAD_REACH_M:
            assert code == ""
        else:
            assert code == lookup.roads[lookup._roads._owner[away[n].argmin()]].code
            assert found.chief[n] == f"chief {code[1:]}"


def test_a_point_on_a_border_belongs_to_the_first_cell_by_code() -> None:
    boxes = {"cell:b": shapely.box(120.0, 31.0, 120.001, 31.001), "cell:a": shapely.box(120.001, 31.0, 120.002, 31.001)}
    lookup = Lookup({code: Cell(code, f"g-{code}", "001") for code in "ab"}, {}, {}, boxes)
    assert lookup.find([120.001, 120.0005, 121.0], [31.0005] * 3).cell.tolist() == ["a", "b", ""]


def test_without_cells_the_areas_themselves_are_asked() -> None:
    areas = {"street:001": Area("001", "street", "甲"), "grid:g1": Area("g1", "grid", "乙")}
    outlines = {"street:001": shapely.box(120, 31, 120.01, 31.01), "grid:g1": shapely.box(120, 31, 120.005, 31.01)}
    found = Lookup({}, areas, {}, outlines).find([120.001, 120.009], [31.001] * 2)
    assert (found.street.tolist(), found.grid.tolist(), found.cell.tolist()) == (["001", "001"], ["g1", ""], ["", ""])


def test_a_lookup_of_nothing_finds_nothing() -> None:
    lookup = Lookup({}, {}, {}, {})
    assert not lookup.has_areas
    assert [column.tolist() for column in lookup.find([120.0], [31.0])] == [[""]] * 7


# --- who handles it -----------------------------------------------------------------------------------------------


def atlas() -> Atlas:
    units = (
        Unit("water", "供水公司", "Water company"),
        Unit("water-001", "供水公司驻甲", "Water office", "001", "water"),
        Unit("lift-co", "电梯维保一", "Lift contractor", department="lift-maintenance"),
        Unit("street-001", "甲街道", "First street", "001"),
        Unit("street-002", "乙街道", "Second street", "002"),
    )
    cells = (Cell("c1", "g1", "001", "w1", "m1"), Cell("c2", "g2", "002"))
    devices = (
        Device("hyd", "hydrant", "gw", Place(120, 31, "c1", road="r1"), ()),
        Device("far", "hydrant", "gw", Place(120, 31, "c2"), (), maintainer="nobody"),
        Device("lift", "elevator", "gw", Place(120, 31, "c1"), (), maintainer="lift-co"),
    )
    return Atlas(Registry((), devices, cells, units, roads=(Road("r1", "路", chief="路长甲"),)))


@pytest.mark.parametrize(
    ("department", "subject", "unit"),
    [
        ("lift-maintenance", "lift", "lift-co"),  # the asset's own maintainer does this department's work
        ("water", "lift", "water-001"),  # it does not do this one's: the office stationed in the street
        ("water", "hyd", "water-001"),
        ("water", "far", "water"),  # no office there: the department itself
        ("water", "unknown", "water"),
    ],
)
def test_the_handling_unit_follows_the_rule(department: str, subject: str, unit: str) -> None:
    assert atlas().handler(department, subject) == unit


def test_a_stationed_office_does_not_lead_its_street_and_a_road_has_its_chief() -> None:
    located = atlas().locate("hyd")
    assert (located.area_owner, located.road_chief, located.workstation, located.community) == (
        "street-001", "路长甲", "w1", "m1")  # fmt: skip


def test_the_rule_agrees_with_the_districts_own() -> None:
    district = build(7, "reference")
    ours = Atlas(district.registry)
    for device in district.registry.devices[::37]:
        for department in ("water", "lift-maintenance", "sensor-ops", "urban-order"):
            assert ours.handler(department, device.id) == district.handler(department, device.id)
