"""The district stands as described, and follows from its seed alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from simulators.district import DIVISION, District, build
from streams.registry import Index, decode_registry, encode_registry


@pytest.fixture(scope="module")
def district() -> District:
    return build(11)


def test_counts_are_those_of_the_brief(district: District) -> None:
    assert Counter(device.kind for device in district.registry.devices) == {
        "hydrant": 200,
        "elevator": 20,
        "gateway": 5,
    }
    assert [len(members) for members in district.zones.values()] == [20] * 10
    assert sum(len(members) for members in district.buildings.values()) == 20
    assert len(district.buildings) == 6
    assert {gateway.shard for gateway in district.registry.gateways} == {0, 1}
    assert len({cell.grid for cell in district.registry.cells}) >= 6
    assert len({cell.street for cell in district.registry.cells}) == 2


@pytest.mark.parametrize("group", ["zones", "buildings"])
def test_a_zone_or_building_is_inside_one_gateway_grid_and_street(district: District, group: str) -> None:
    for members in getattr(district, group).values():
        devices = [district.devices[name] for name in members]
        cells = [district.cells[device.place.cell] for device in devices]
        assert len({device.gateway for device in devices}) == 1
        assert len({(cell.grid, cell.street) for cell in cells}) == 1


def test_cells_have_fifteen_digits_and_every_device_stands_in_a_known_one(district: District) -> None:
    codes = [cell.code for cell in district.registry.cells]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(DIVISION + r"\d{9}", code) for code in codes)
    assert {device.place.cell for device in district.registry.devices} <= set(codes)


def test_streets_have_an_owner(district: District) -> None:
    owners = {unit.street: unit.code for unit in district.registry.units if unit.street}
    assert owners == {"001": "street-001", "002": "street-002"}


def test_neighbours_stand_apart_but_within_their_zone(district: District) -> None:
    for members in district.zones.values():
        distances = [district.distance_m(one, other) for one in members for other in members if one < other]
        assert min(distances) > 50
        assert max(distances) < 1200


def test_coordinates_agree_with_metres(district: District) -> None:
    one, other = district.devices["hyd-000001"].place, district.devices["hyd-000010"].place
    east_m = (other.lon - one.lon) * 111_320 * 0.8554
    assert east_m == pytest.approx(district.metres["hyd-000010"][0] - district.metres["hyd-000001"][0], abs=1.0)


def test_the_registry_compiles_and_its_bytes_are_the_same_each_time(district: District) -> None:
    content = encode_registry(district.registry)
    assert content == encode_registry(build(11).registry)
    assert content != encode_registry(build(12).registry)
    index = Index(decode_registry(content), "name")
    assert index.n_series == 200 * 5 + 20 * 8 + 5 * 2
