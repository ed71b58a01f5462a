"""The reference district has the reference city's numbers, nests without a gap, and follows from its seed alone."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.model import Device
from simulators.district import DIVISION, District, build
from simulators.world.partition import apportion, connected, split
from simulators.world.reference import build_reference
from streams.registry import Index, decode_registry, encode_registry

LEVELS = ("street", "workstation", "grid", "community")


@pytest.fixture(scope="module", params=[11, 23])
def district(request: pytest.FixtureRequest) -> District:
    return build(request.param, "reference")


def devices(district: District, kind: str, tag: str = "") -> list[Device]:
    return [d for d in district.registry.devices if d.kind == kind and (not tag or tag in d.tags)]


def test_counts_are_those_of_the_reference_city(district: District) -> None:
    areas = Counter(area.kind for area in district.registry.areas)
    assert areas == {"street": 14, "workstation": 32, "grid": 85, "community": 274}
    assert len(district.registry.cells) == 3600
    assert Counter(road.level for road in district.registry.roads) == {1: 22, 2: 224}
    assert len({road.chief for road in district.registry.roads}) == 246


def test_assets_are_as_many_as_ordered(district: District) -> None:
    kinds = Counter(device.kind for device in district.registry.devices)
    assert kinds == {"hydrant": 2000, "elevator": 600, "camera": 400, "pump_room": 48, "gateway": 64}
    assert len(devices(district, "hydrant", "battery")) == 1900
    assert len(devices(district, "hydrant", "mains")) == 100
    assert len(devices(district, "hydrant", "dry_barrel")) == 160
    assert len(devices(district, "hydrant", "wet_barrel")) == 1840
    assert 85 <= len(devices(district, "elevator", "retrofit")) <= 100
    assert Counter(tag for device in devices(district, "camera") for tag in device.tags) == {
        "road": 160,
        "fire_lane": 120,
        "market": 80,
        "square": 40,
    }
    sizes = [len(members) for members in district.buildings.values()]
    assert (len(sizes), sum(sizes)) == (160, 600)
    assert 2 <= min(sizes) <= max(sizes) <= 8
    assert set(district.floors) == set(district.buildings)


def test_each_battery_hydrant_has_one_report_interval_and_a_sensor_number_of_its_own(district: District) -> None:
    battery = devices(district, "hydrant", "battery")
    assert all(sum(tag.startswith("report_") for tag in device.tags) == 1 for device in battery)
    sensors = [device.sensor for device in battery]
    assert len(set(sensors)) == len(sensors)
    assert all(re.fullmatch(r"9901\d{11}", sensor) for sensor in sensors)
    assert all(device.wire_id == device.id for device in district.registry.devices if device not in battery)


def test_areas_nest_and_every_cell_names_its_whole_line(district: District) -> None:
    areas = {area.code: area for area in district.registry.areas}
    assert len(areas) == 14 + 32 + 85 + 274
    for cell in district.registry.cells:
        code = cell.community
        for level in reversed(LEVELS):
            area = areas[code]
            assert (area.kind, code) == (level, getattr(cell, level))
            code = area.parent
        assert code == DIVISION
    for level in LEVELS:  # nobody answers for nothing
        assert {getattr(cell, level) for cell in district.registry.cells} == {
            area.code for area in areas.values() if area.kind == level
        }


def test_areas_are_in_one_piece(district: District) -> None:
    for level in (*LEVELS, "zone"):
        pieces = defaultdict(list)
        zone_of = {code: zone for zone, codes in district.zone_cells.items() for code in codes}
        for cell in district.registry.cells:
            west, _, _, north = district.boxes[cell.code]
            name = zone_of[cell.code] if level == "zone" else getattr(cell, level)
            pieces[name].append((round(west / 100), round(-north / 100)))
        assert all(connected(nodes) for nodes in pieces.values()), level


def test_cells_are_numbered_west_to_east_then_north_to_south(district: District) -> None:
    communities = defaultdict(list)
    for cell in district.registry.cells:
        assert re.fullmatch(DIVISION + r"0\d\d\d{3}\d{3}", cell.code)
        assert cell.code.startswith(DIVISION + cell.street)
        assert cell.code[:12] == cell.community
        communities[cell.community].append(cell.code)
    assert len(district.cells) == len(district.registry.cells)
    for codes in communities.values():
        corners = [(-district.boxes[code][3], district.boxes[code][0]) for code in sorted(codes)]
        assert corners == sorted(corners)
        assert [int(code[12:]) for code in sorted(codes)] == list(range(1, len(codes) + 1))


def test_every_device_stands_in_its_cell_at_its_nearest_road(district: District) -> None:
    roads = {road.code: road for road in district.registry.roads}
    at = district.at([device.id for device in district.registry.devices])
    ends = np.array([district.lines[code] for code in roads])
    nearest = np.maximum(np.maximum(ends.min(axis=1) - at[:, None], at[:, None] - ends.max(axis=1)), 0)
    found = np.hypot(nearest[..., 0], nearest[..., 1]).argmin(axis=1)
    for (x, y), device, road in zip(at.tolist(), district.registry.devices, found.tolist(), strict=True):
        west, south, east, north = district.boxes[device.place.cell]
        assert west + 1 < x < east - 1
        assert south + 1 < y < north - 1
        assert device.place.road == list(roads)[road]
        assert device.place.address.startswith(roads[device.place.road].zh)


def test_what_stands_in_a_zone_or_building_speaks_in_one_shard_and_a_building_through_one_gateway(
    district: District,
) -> None:
    shard = {gateway.id: gateway.shard for gateway in district.registry.gateways}
    zone_of = {code: zone for zone, codes in district.zone_cells.items() for code in codes}
    shards = defaultdict(set)
    for device in district.registry.devices:
        zone = zone_of[device.place.cell]
        assert device.zone in ("", zone)
        shards[zone].add(shard[device.gateway])
    assert len(shards) == len(district.zones) == len(district.pump_rooms) == 48
    assert all(len(found) == 1 for found in shards.values())
    for members in district.buildings.values():
        assert len({district.devices[name].gateway for name in members}) == 1
        assert len({district.devices[name].place.cell for name in members}) == 1


def test_clouds_carry_the_battery_hydrants_and_shards_are_balanced(district: District) -> None:
    loads = Counter(device.gateway for device in district.registry.devices if device.kind != "gateway")
    clouds = {f"cloud-{shard}": shard for shard in range(4)}
    assert {gateway.id: gateway.shard for gateway in district.registry.gateways if gateway.id in clouds} == clouds
    for device in district.registry.devices:
        assert (device.gateway in clouds) == ("battery" in device.tags) or device.kind == "gateway"
    pis = {name: load for name, load in loads.items() if name not in clouds}
    assert len(pis) == 60
    assert 14 <= min(pis.values()) <= max(pis.values()) <= 28
    shard = {gateway.id: gateway.shard for gateway in district.registry.gateways}
    devices_of = Counter(shard[device.gateway] for device in district.registry.devices)
    assert max(devices_of.values()) < 1.2 * min(devices_of.values())


def test_a_gateway_knows_what_speaks_through_it(district: District) -> None:
    served = [name for gateway in district.registry.gateways for name in district.of_gateway(gateway.id)]
    assert sorted(served) == sorted(d.id for d in district.registry.devices if d.kind != "gateway")
    assert all(district.devices[name].gateway == "gw-07" for name in district.of_gateway("gw-07"))
    assert district.of_gateway("gw-99") == ()


def test_pipes_join_the_hydrants_of_a_zone_and_no_others(district: District) -> None:
    for zone, members in district.zones.items():
        ways = district.pipes[zone]
        at = district.at(members)
        straight = np.hypot(*(at[:, None] - at[None]).T)
        assert ways.shape == (len(members), len(members))
        assert np.isfinite(ways).all()
        assert (ways == ways.T).all()
        # 12 m across the road and 2 m from a cell's edge are no pipe
        assert (ways > straight - 16).all()
        assert np.median(ways[straight > 0] / straight[straight > 0]) < 2.0
    one, other = district.zones["zone-01"][0], district.zones["zone-02"][0]
    assert district.pipe_m(one, other) == np.inf
    near = district.zones["zone-01"][1]
    assert district.pipe_m(one, near) == district.pipe_row(one)[1]


def test_hydrants_of_a_zone_are_many_and_not_on_top_of_each_other(district: District) -> None:
    assert all(15 <= len(members) <= 75 for members in district.zones.values())
    at = district.at([device.id for device in devices(district, "hydrant")])
    ways = np.hypot(*(at[:, None] - at[None]).T)
    np.fill_diagonal(ways, np.inf)
    assert ways.min() >= 40.0


def test_the_maintainer_handles_what_it_is_under_contract_for(district: District) -> None:
    lift = devices(district, "elevator")[0]
    assert district.handler("lift-maintenance", lift.id) == lift.maintainer != ""
    assert district.handler("sensor-ops", lift.id) == "sensor-ops"  # the lift's maintainer does not do that
    assert district.handler("lift-rescue", lift.id) == "lift-rescue"


def test_an_office_in_the_street_handles_before_its_department(district: District) -> None:
    camera = devices(district, "camera")[0]
    street = district.cells[camera.place.cell].street
    assert district.handler("urban-order", camera.id) == f"urban-order-{street}"
    assert district.handler("sanitation", camera.id) == "sanitation"
    assert district.handler("water", district.zones["zone-01"][0]).startswith("water-0")
    assert district.area_owner(street) == f"street-{street}"
    assert district.area_owner("099") == ""


def test_every_unit_that_is_named_exists(district: District) -> None:
    codes = [unit.code for unit in district.registry.units]
    assert len(set(codes)) == len(codes)
    assert {device.maintainer for device in district.registry.devices} <= {*codes, ""}
    contractors = Counter(unit.department for unit in district.registry.units if not unit.street)
    assert contractors["lift-maintenance"] >= 3
    assert contractors["sensor-ops"] >= 2
    for department in ("urban-order", "water"):
        stationed = {unit.street for unit in district.registry.units if unit.department == department}
        assert len(stationed - {""}) == 14


def test_names_are_distinct_in_both_languages(district: District) -> None:
    areas = [area for area in district.registry.areas if area.kind != "grid"]
    for things in (areas, district.registry.roads, district.registry.units):
        assert len({thing.zh for thing in things}) == len(things)
        assert len({thing.en for thing in things}) == len(things)


def test_it_follows_from_the_seed_and_compiles(district: District) -> None:
    content = encode_registry(district.registry)
    assert content == encode_registry(build_reference(district.seed).registry)
    assert content != encode_registry(build_reference(district.seed + 1).registry)
    index = Index(decode_registry(content), "name")
    assert len(index.devices) == 3112


def test_building_it_takes_less_than_three_seconds_of_processor() -> None:
    started = time.process_time()
    build(5, "reference")
    assert time.process_time() - started < 3.0


def test_the_small_district_answers_the_same_questions() -> None:
    small = build(11)
    hydrant = small.zones["zone-01"][0]
    assert small.handler("water", hydrant) == "water"
    assert small.area_owner("001") == "street-001"
    assert small.pipe_m(hydrant, hydrant) == 0.0
    assert small.pipe_m(hydrant, small.zones["zone-01"][5]) >= small.distance_m(hydrant, small.zones["zone-01"][5])
    for device in small.registry.devices:
        (x, y), (west, south, east, north) = small.metres[device.id], small.boxes[device.place.cell]
        assert west <= x <= east
        assert south <= y <= north


@pytest.mark.parametrize(
    ("total", "sizes"), [(5, [1.0, 1.0]), (3, [100.0, 1.0, 1.0]), (85, [float(n) for n in range(1, 33)])]
)
def test_shares_are_whole_and_complete(total: int, sizes: list[float]) -> None:
    shares = apportion(total, sizes)
    assert sum(shares) == total
    assert min(shares) >= 1


@given(st.integers(3, 20), st.integers(3, 20), st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9))
def test_a_cut_loses_nothing_and_leaves_connected_parts_of_the_wanted_sizes(
    across: int, down: int, weights: list[float]
) -> None:
    nodes = [(column, row) for row in range(down) for column in range(across)]
    parts = split(nodes, weights)
    assert sorted(node for part in parts for node in part) == sorted(nodes)
    assert all(connected(part) for part in parts)
    wanted = [len(nodes) * weight / sum(weights) for weight in weights]
    assert all(abs(len(part) - size) <= 4 for part, size in zip(parts, wanted, strict=True))


def test_what_hangs_together_only_at_corners_is_not_connected() -> None:
    assert connected([(0, 0), (1, 0), (1, 1)])
    assert not connected([(0, 0), (1, 1)])
    with pytest.raises(ValueError, match="3 nodes cannot be cut"):
        split([(0, 0), (1, 1), (2, 2)], [1.0, 1.0])
