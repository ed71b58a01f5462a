"""The district's signals and faults: what each cause looks like, and that no moment needs a history."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, RunClock, monotonic_s, real_unix_ms
from citybrain.errors import UsageError
from citybrain.layout import Active, Layout, Run
from citybrain.mailbox import Mailbox
from citybrain.model import Lane, Reading
from citybrain.wire import Header, columns_message, decode_status, open_message, readings_of
from simulators import noise
from simulators.causes import KIND, KINDS, RANGES, Cause, Kind, is_battery, make, permits, report_ms, suits
from simulators.columns import Columns, Emitted, Frames, by_luck
from simulators.columns import readings_of as emitted
from simulators.district import District, build
from simulators.faults import GAP_MS, Schedule, areas_of, demo, read_truth, truth_of
from simulators.noise import Noise
from simulators.scripts import BUTTON, MAINS_LOST
from simulators.sensors import CATCH_UP_MS, FAST_GATEWAY, FAST_MS, Sensors
from simulators.simulate import Diary, chosen, provision
from simulators.water import Hydrants, lively
from streams.registry import encode_registry
from tests.conftest import end, eventually

ORIGIN = 1_767_225_600_000
NOON = ORIGIN + 4 * HOUR_MS  # the district keeps UTC+8
DISTRICT = build(11)
CITY = build(11, "reference")


class Planted(Schedule):
    """A schedule of given causes alone."""

    def __init__(self, district: District, *causes: Cause) -> None:
        super().__init__(district, 11, ORIGIN)
        self._given = causes

    def causes(self, from_ms: int, to_ms: int) -> list[Cause]:
        return [cause for cause in self._given if from_ms <= cause.start_ms < to_ms]

    def _plan_block(self, block: int) -> tuple[Cause, ...]:
        return self._given if block == 0 else ()


def planted(
    kind: str, centre: str, start_ms: int = NOON, minutes: float = 30, seed: int = 1, district: District = DISTRICT
) -> Cause:
    return make(random.Random(seed), district, kind, (start_ms, start_ms + round(minutes * MINUTE_MS)), centre)


def said(
    device: str, from_ms: int, to_ms: int, *causes: Cause, district: District = DISTRICT
) -> list[tuple[Lane, Reading]]:
    """What one device says under these causes alone, in true time."""
    source = Sensors(district, district.devices[device].gateway, Planted(district, *causes))
    wire = district.devices[device].wire_id
    blocks = [block for block in source.columns(from_ms, to_ms) if wire in block.names]
    return emitted([block.rows(block.device == block.names.index(wire)) for block in blocks])


def values(items: list[tuple[Lane, Reading]], metric: str) -> list[float]:
    return [reading.values[metric] for _, reading in items if metric in reading.values]


def sensors(gateway: str = "gw-01", mark: Path | None = None, seed: int = 11) -> Sensors:
    return Sensors(DISTRICT, gateway, Schedule(DISTRICT, seed, ORIGIN), mark)


def of_lane(items: list[tuple[Lane, Reading]], lane: Lane) -> list[Reading]:
    return [reading for found, reading in items if found is lane]


def city_device(kind: str, *tags: str) -> str:
    return next(d.id for d in CITY.registry.devices if d.kind == kind and set(tags) <= set(d.tags))


# --- noise ---


def test_noise_is_uniform_and_normal_enough() -> None:
    one = Noise(7, "any")
    uniform = [one.uniform(n) for n in range(20_000)]
    normal = [one.normal(n) for n in range(20_000)]
    assert abs(sum(uniform) / len(uniform) - 0.5) < 0.01
    assert abs(sum(normal) / len(normal)) < 0.03
    assert abs(sum(n * n for n in normal) / len(normal) - 1.0) < 0.03
    assert one.bits(5) != Noise(7, "other").bits(5) != Noise(8, "other").bits(5)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1), st.integers(0, 99))
def test_arrays_of_noise_are_the_same_numbers(indexes: list[int], seed: int) -> None:
    of, at = noise.keys(seed, ["any"] * len(indexes)), np.array(indexes)
    assert noise.bits(of, at).tolist() == [Noise(seed, "any").bits(n) for n in indexes]
    assert noise.uniforms(of, at).tolist() == [Noise(seed, "any").uniform(n) for n in indexes]
    assert noise.normals(of, at).tolist() == [Noise(seed, "any").normal(n) for n in indexes]


# --- columns ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_frames_hold_what_was_said_whatever_their_cuts(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    at = np.array(data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))) + NOON
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    told = np.array(data.draw(st.lists(st.sampled_from([0.5, 1.0, np.nan]), min_size=2 * count, max_size=2 * count)))
    told = told.reshape(count, 2)
    told[:, 0] = np.where(np.isnan(told).all(axis=1), 3.0, told[:, 0])
    block = Columns(Lane.EVENT, ("a", "b", "c"), ("x", "y"), np.array(numbers), at, told)
    frames = Frames([block], 7)
    cuts = frames.cut(np.array(sorted(data.draw(st.sets(st.integers(0, 51)))), np.int64) + NOON)
    found: list[Reading] = []
    counted = 0
    for start, stop in pairwise([0, *cuts, len(frames.at)]):
        for body, readings in frames.bodies(start, stop):
            message = open_message(columns_message(Header(1, 1, 1, 0), body))
            found += readings_of(message)
            counted += readings
    assert counted == count
    whole = [(r.observed_at, r.device, name, value) for r in found for name, value in r.values.items()]
    expected = [reading for _, reading in emitted([block], 7)]
    assert whole == [(r.observed_at, r.device, name, value) for r in expected for name, value in r.values.items()]


def test_a_few_are_missed_and_some_come_twice() -> None:
    assert by_luck(np.array([0.0, 0.5, 0.999, 0.2])).tolist() == [1, 2, 2, 3]


# --- time ---


@settings(max_examples=12, deadline=None)
@given(
    start=st.integers(0, 2 * DAY_MS),
    cuts=st.lists(st.integers(1, 20 * MINUTE_MS), min_size=1, max_size=4, unique=True),
    gateway=st.sampled_from(["gw-01", "gw-04"]),
)
def test_any_moment_is_the_same_whoever_asks_from_when(start: int, cuts: list[int], gateway: str) -> None:
    begin, stop = ORIGIN + start, ORIGIN + start + 20 * MINUTE_MS
    times = [begin, *sorted(begin + cut for cut in cuts), stop]
    parts = [
        item
        for low, high in pairwise(times)
        for item in sensors(gateway).between(low, high)  # a fresh simulator each time
    ]
    assert parts == sensors(gateway).between(begin, stop)


@pytest.mark.parametrize("gateway", ["gw-07", "cloud-1"])
def test_block_boundaries_do_not_matter_in_the_city(gateway: str) -> None:
    schedule = Schedule(CITY, 11, ORIGIN)
    names = CITY.of_gateway(gateway)
    causes = schedule.around(names, ORIGIN, ORIGIN + 7 * DAY_MS)
    for cause in causes[:6]:
        begin, stop = cause.start_ms - 45 * MINUTE_MS, cause.start_ms + 45 * MINUTE_MS
        times = [begin, cause.start_ms - 1, cause.start_ms, cause.start_ms + 61_003, stop]
        cut = [i for low, high in pairwise(times) for i in Sensors(CITY, gateway, schedule).between(low, high)]
        assert cut == Sensors(CITY, gateway, schedule).between(begin, stop)


def test_a_live_source_says_what_blocks_say() -> None:
    polled = sensors("gw-02")
    polled.poll(NOON + polled.skew_ms)
    found: list[Emitted] = []
    for now_ms in range(NOON, NOON + 8 * MINUTE_MS, 7_300):
        found += polled.poll(now_ms + polled.skew_ms)
    assert found == sensors("gw-02").between(NOON, now_ms)


def states(items: list[tuple[Lane, Reading]]) -> set[tuple[str, str]]:
    assert all(lane == Lane.EVENT for lane, _ in items)
    return {(reading.device, name) for _, reading in items for name in reading.values}


def every_event_series() -> set[tuple[str, str]]:
    names = set(DISTRICT.of_gateway("gw-01"))
    return {(d.id, name) for d in DISTRICT.registry.devices if d.id in names for name in d.event_metrics}


def test_a_restarted_simulator_catches_up_a_short_hole_and_skips_a_long_one(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    first = sensors(mark=mark)
    at = NOON + first.skew_ms
    said = first.poll(at)  # it begins now, with what stands
    assert {(lane, reading.observed_at) for lane, reading in said} == {(Lane.EVENT, at)}
    assert [reading.device for _, reading in said] == list(DISTRICT.of_gateway("gw-01"))
    before = first.poll(at + 30 * SECOND_MS)
    after = sensors(mark=mark).poll(at + 60 * SECOND_MS)
    assert before + after == sensors().between(NOON, NOON + 60 * SECOND_MS)
    later = at + 60 * SECOND_MS + CATCH_UP_MS + 1
    assert {reading.observed_at for _, reading in sensors(mark=mark).poll(later)} == {later}
    assert sensors(mark=mark).poll(at) == []  # a clock put back says nothing twice


def test_power_up_tells_what_changed_while_nobody_listened() -> None:
    schedule = Schedule(DISTRICT, 11, ORIGIN)
    cause = next(c for c in schedule.causes(ORIGIN, ORIGIN + DAY_MS) if c.kind == "knocked_over")
    thing = Sensors(DISTRICT, DISTRICT.devices[cause.centre].gateway, schedule)

    def tilt(at_ms: int) -> float:
        return next(r.values["tilt_deg"] for _, r in thing.power_up(at_ms) if r.device == cause.centre)

    assert tilt(cause.start_ms - 1) < 3
    assert tilt(cause.start_ms + MINUTE_MS) >= 40
    assert tilt(cause.end_ms) < 3


def test_readings_come_in_order_and_the_fast_gateway_is_ahead() -> None:
    fast = sensors(FAST_GATEWAY)
    assert fast.skew_ms == FAST_MS
    items = fast.between(NOON, NOON + 5 * MINUTE_MS)
    times = [reading.observed_at for _, reading in items]
    assert times == sorted(times)
    assert times[0] >= NOON + FAST_MS
    assert NOON + 5 * MINUTE_MS < times[-1] < NOON + 5 * MINUTE_MS + FAST_MS


# --- water ---


def test_a_healthy_hydrant_stays_near_its_static_pressure_all_day() -> None:
    for name in ("hyd-000001", "hyd-000111", "hyd-000200"):
        readings = of_lane(said(name, ORIGIN, ORIGIN + 2 * DAY_MS), Lane.TELEMETRY)
        pressures = [reading.values["pressure_mpa"] for reading in readings]
        assert 0.20 < min(pressures) < max(pressures) < 0.37
        assert max(reading.values["flow_lps"] for reading in readings) < 0.1
        assert min(reading.values["battery_v"] for reading in readings) > 3.35
        night = [r.values["pressure_mpa"] for r in readings if 18 <= r.observed_at % DAY_MS / HOUR_MS < 20]
        peak = [r.values["pressure_mpa"] for r in readings if 11 <= r.observed_at % DAY_MS / HOUR_MS < 12]
        assert sum(night) / len(night) - sum(peak) / len(peak) > 0.02  # people sleep; people cook


def test_a_few_reports_are_missed_and_some_come_again() -> None:
    readings = of_lane(said("hyd-000001", ORIGIN, ORIGIN + 2 * DAY_MS), Lane.TELEMETRY)
    distinct = {reading.observed_at for reading in readings}
    assert 0.008 < 1 - len(distinct) / (2 * DAY_MS / MINUTE_MS) < 0.025
    assert 0 < len(readings) - len(distinct) < 0.015 * len(readings)


def pressures(burst: Cause, at_ms: int, district: District = DISTRICT) -> dict[str, float]:
    zone = district.zones[district.devices[burst.centre].zone]
    group = Hydrants(district, [district.devices[name] for name in zone])
    state = group.state(np.arange(len(zone)), np.full(len(zone), at_ms), (burst,))
    return dict(zip(zone, state.pressure_mpa.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), hour=st.integers(0, 23), zone=st.integers(1, 10))
def test_a_burst_is_felt_by_several_neighbours_and_the_nearest_most(seed: int, hour: int, zone: int) -> None:
    members = DISTRICT.zones[f"zone-{zone:02d}"]
    burst = planted("mains_burst", members[seed % 20], ORIGIN + hour * HOUR_MS, 40, seed)
    assert set(burst.subjects) == set(members)
    before = pressures(burst, burst.start_ms)
    after = pressures(burst, burst.start_ms + MINUTE_MS)
    falls = {name: before[name] - after[name] for name in members}
    assert sum(pressure < 0.135 for pressure in after.values()) >= 4 or sum(fall > 0.08 for fall in falls.values()) >= 6
    assert falls[burst.centre] >= max(falls.values()) - 0.01
    assert min(pressures(burst, burst.end_ms + 1).values()) > 0.2


def test_in_the_city_a_burst_follows_the_pipes_and_leaves_dry_barrels_alone() -> None:
    centre = city_device("hydrant", "wet_barrel", "battery")
    burst = planted("mains_burst", centre, seed=4, district=CITY)
    before, after = (pressures(burst, at, CITY) for at in (NOON, NOON + 5 * MINUTE_MS))
    wet = [name for name in before if "dry_barrel" not in CITY.devices[name].tags]
    by_pipe = sorted(wet, key=lambda name: CITY.pipe_m(centre, name))
    falls = [before[name] - after[name] for name in by_pipe]
    assert all(near >= far - 0.01 for near, far in pairwise(falls))
    dry = next(d.id for d in CITY.registry.devices if "dry_barrel" in d.tags)
    assert max(values(said(dry, NOON, NOON + DAY_MS, district=CITY), "pressure_mpa")) < 0.03


def test_a_hydrant_in_another_zone_does_not_feel_the_burst() -> None:
    assert "hyd-000021" not in planted("mains_burst", "hyd-000001").subjects


def test_low_pressure_is_low_and_comes_back() -> None:
    cause = planted("low_pressure", "hyd-000001")
    low = values(said("hyd-000001", NOON + 5 * MINUTE_MS, NOON + 25 * MINUTE_MS, cause), "pressure_mpa")
    assert max(low) < 0.155
    assert min(values(said("hyd-000001", cause.end_ms, cause.end_ms + HOUR_MS, cause), "pressure_mpa")) > 0.2


def test_a_knocked_over_hydrant_lies_flows_and_reports_every_ten_seconds() -> None:
    cause = planted("knocked_over", "hyd-000001", minutes=60)
    items = said("hyd-000001", NOON - MINUTE_MS, cause.end_ms + MINUTE_MS, cause)
    tilts = [reading for reading in of_lane(items, Lane.EVENT) if reading.observed_at in (NOON, cause.end_ms)]
    assert 13 <= tilts[0].values["tilt_deg"] <= 91
    assert tilts[1].values["tilt_deg"] < 3
    lying = [r.observed_at for r in of_lane(items, Lane.TELEMETRY) if NOON < r.observed_at < cause.end_ms]
    assert len(set(lying)) > 0.97 * 360


def test_a_blow_is_told_at_once_and_is_over_at_once() -> None:
    name = city_device("hydrant", "battery")
    cause = planted("bump", name, minutes=0.1, district=CITY)
    items = said(name, NOON - MINUTE_MS, NOON + HOUR_MS, cause, district=CITY)
    impacts = [(r.observed_at, r.values["impact_g"]) for _, r in items if "impact_g" in r.values]
    assert impacts[0][0] == NOON
    assert impacts[0][1] >= 2
    assert impacts[1][1] == 0.0
    tilts = [(r.observed_at, r.values["tilt_deg"]) for _, r in items if "tilt_deg" in r.values]
    assert tilts[-1][0] == cause.end_ms
    assert tilts[-1][1] < 3


def test_authorised_use_looks_exactly_like_illegal_use() -> None:
    illegal = planted("illegal_use", "hyd-000001", minutes=10)
    same = Cause("x", "authorised_use", illegal.start_ms, illegal.end_ms, illegal.centre, illegal.subjects,
                 illegal.strength)  # fmt: skip
    span = NOON - MINUTE_MS, illegal.end_ms + MINUTE_MS
    items = said("hyd-000001", *span, illegal)
    assert items == said("hyd-000001", *span, same)
    flowing = [r for r in of_lane(items, Lane.TELEMETRY) if r.values["flow_lps"] > 0.5]
    assert all(2.5 < r.values["flow_lps"] < 13 for r in flowing[1:-1])
    assert [r.values["cap_open"] for r in of_lane(items, Lane.EVENT)][:2] == [1.0, 0.0]
    (permit,) = permits(same, DISTRICT)
    assert permit.from_ms < same.start_ms < same.end_ms < permit.until_ms
    assert permits(illegal, DISTRICT) == []


def test_a_lorry_is_permitted_in_its_grid_and_a_lift_by_its_name() -> None:
    (lorry,) = permits(planted("sprinkler_lorry", "hyd-000001"), DISTRICT)
    assert lorry.subject == f"grid:{DISTRICT.cells[DISTRICT.devices['hyd-000001'].place.cell].grid}"
    (works,) = permits(planted("lift_maintenance", "lift-0001"), DISTRICT)
    assert (works.subject, works.rule) == ("lift-0001", "*")


def test_a_dying_battery_passes_the_limit_when_its_cause_begins() -> None:
    cause = planted("battery_low", "hyd-000001", minutes=180)
    volts = [(r.observed_at, r.values["battery_v"]) for r in of_lane(
        said("hyd-000001", NOON - 20 * MINUTE_MS, cause.end_ms + HOUR_MS, cause), Lane.TELEMETRY)]  # fmt: skip
    assert all(v > 3.2 for at, v in volts if at < NOON - 3 * MINUTE_MS)
    assert all(v < 3.19 for at, v in volts if NOON + 15 * MINUTE_MS < at < cause.end_ms)
    assert all(v > 3.35 for at, v in volts if at > cause.end_ms)


# --- water: devices with a battery ---


def test_a_battery_device_reports_at_its_interval_while_all_is_well() -> None:
    for hours in (1, 4, 12, 24):
        name = city_device("hydrant", f"report_{hours}h")
        items = of_lane(said(name, ORIGIN, ORIGIN + 4 * DAY_MS, district=CITY), Lane.TELEMETRY)
        assert len({r.observed_at for r in items}) == pytest.approx(96 / hours, abs=2)
        assert report_ms(CITY.devices[name]) == hours * HOUR_MS


def test_beyond_its_own_limits_it_reports_each_minute_for_half_an_hour_and_that_it_is_over() -> None:
    name = city_device("hydrant", "report_24h", "wet_barrel")
    cause = planted("low_pressure", name, minutes=100, district=CITY)
    items = of_lane(said(name, NOON - HOUR_MS, cause.end_ms + HOUR_MS, cause, district=CITY), Lane.TELEMETRY)
    times = [r.observed_at for r in items]
    assert NOON - MINUTE_MS < times[0] <= NOON + MINUTE_MS  # the minute before it noticed
    assert items[0].values["pressure_mpa"] > 0.2
    assert 28 <= sum(at < NOON + 40 * MINUTE_MS for at in times) <= 33
    assert not any(NOON + 40 * MINUTE_MS < at < cause.end_ms - 2 * MINUTE_MS for at in times)
    assert cause.end_ms - MINUTE_MS <= times[-1] <= cause.end_ms + 12 * MINUTE_MS
    assert items[-1].values["pressure_mpa"] > 0.2


def test_each_limit_counts_its_own_half_hour() -> None:
    passed = np.zeros((2, 120), bool)
    passed[0, 10:100] = True
    passed[1, 60:70] = True
    minutes = lively(passed, np.zeros(120, bool)).tolist()
    assert minutes == [*range(9, 40), *range(59, 71), 100]


def test_ice_lifts_the_pressure_of_a_frozen_hydrant_and_frost_does_not() -> None:
    name = city_device("hydrant", "report_12h", "wet_barrel")
    for kind, highest in (("freezing", 0.42), ("frost", 0.0)):
        cause = planted(kind, name, minutes=200, district=CITY)
        items = of_lane(said(name, NOON, cause.end_ms, cause, district=CITY), Lane.TELEMETRY)
        assert min(r.values["temperature_c"] for r in items) < 0
        cold = [r.values["pressure_mpa"] for r in items if r.values["temperature_c"] < -0.5]
        assert (max(cold) > highest) if highest else (max(cold) < 0.37)


def test_strokes_of_water_hammer_are_told_one_by_one() -> None:
    name = city_device("hydrant", "battery")
    for kind, least, most in (("water_hammer", 4, 9), ("single_hammer", 1, 2)):
        cause = planted(kind, name, district=CITY)
        told = values(said(name, NOON, NOON + HOUR_MS, cause, district=CITY), "hammer_mpa")
        assert least <= sum(value > 0.29 for value in told) <= most
        assert sum(value == 0.0 for value in told) == sum(value > 0.29 for value in told)


def test_a_leak_leaves_water_in_the_barrel_with_the_cap_closed() -> None:
    name = city_device("hydrant", "battery")
    for kind in ("slow_leak", "draining"):
        cause = planted(kind, name, minutes=15, district=CITY)
        items = said(name, NOON, NOON + HOUR_MS, cause, district=CITY)
        wet = [r.observed_at for _, r in items if r.values.get("water_present") == 1.0]
        assert wet
        assert max(wet) < cause.end_ms
        assert (1.0 in values(items, "cap_open")) == (kind == "draining")


@pytest.mark.parametrize(("kind", "moves"), [("stuck_sensor", 0.0), ("sensor_jump", 0.3), ("drift", 0.0)])
def test_a_defective_sensor_says_what_water_does_not(kind: str, moves: float) -> None:
    name = city_device("hydrant", "mains", "wet_barrel")
    cause = planted(kind, name, minutes=600, district=CITY)
    told = values(said(name, NOON + MINUTE_MS, cause.end_ms, cause, district=CITY), "pressure_mpa")
    usual = values(said(name, NOON + MINUTE_MS, cause.end_ms, district=CITY), "pressure_mpa")
    assert (len(set(told)) == 1) == (kind == "stuck_sensor")
    assert max(abs(one - other) for one, other in zip(told, usual, strict=True)) > moves


def test_a_dead_device_is_silent_and_its_neighbours_are_not() -> None:
    for kind in ("camera", "elevator", "pump_room"):
        name = city_device(kind)
        cause = planted("device_dead", name, district=CITY)
        assert said(name, cause.start_ms, cause.end_ms, cause, district=CITY) == []
        assert said(name, cause.end_ms, cause.end_ms + 5 * MINUTE_MS, cause, district=CITY)
        gateway = Sensors(CITY, CITY.devices[name].gateway, Planted(CITY, cause))
        assert gateway.between(cause.start_ms, cause.start_ms + MINUTE_MS)


def test_a_replaced_sensor_speaks_under_its_own_name_from_then_on() -> None:
    name = city_device("hydrant", "mains")
    device = CITY.devices[name]
    source = Sensors(CITY, device.gateway, Planted(CITY), swaps={name: (NOON, "new-one")})
    heard = {r.device: r.observed_at for _, r in source.between(NOON - 5 * MINUTE_MS, NOON + 5 * MINUTE_MS)}
    assert heard[device.wire_id] < NOON + source.skew_ms <= heard["new-one"]


# --- pump rooms and cameras ---


def test_a_failed_pump_takes_its_zone_down_with_it() -> None:
    room = city_device("pump_room")
    cause = planted("pump_failure", room, district=CITY)
    assert set(CITY.zones[CITY.devices[room].zone]) < set(cause.subjects)
    during = said(room, NOON + MINUTE_MS, cause.end_ms - MINUTE_MS, cause, district=CITY)
    assert max(values(during, "current_a")) < 0.3 * min(
        values(said(room, NOON, NOON + HOUR_MS, district=CITY), "current_a")
    )
    wet = next(n for n in cause.subjects if "wet_barrel" in CITY.devices[n].tags and is_battery(CITY.devices[n]))
    told = values(said(wet, NOON + 3 * MINUTE_MS, NOON + 20 * MINUTE_MS, cause, district=CITY), "pressure_mpa")
    assert told
    assert max(told) < 0.14


def test_water_rises_in_a_flooded_pump_room() -> None:
    room = city_device("pump_room")
    cause = planted("pump_room_flood", room, minutes=60, district=CITY)
    levels = values(said(room, NOON, cause.end_ms, cause, district=CITY), "level_m")
    assert levels[0] < 0.1
    assert max(levels) > 0.18


@pytest.mark.parametrize(
    ("kind", "metric", "low", "high"),
    [
        ("camera_lost", "signal", 0.0, 0.0),
        ("camera_frozen", "motion", 0.0, 0.0),
        ("camera_dirty", "sharpness", 0.0, 0.4),
        ("camera_dark", "brightness", 0.0, 0.03),
        ("camera_moved", "view_shift", 0.3, 1.0),
    ],
)
def test_what_ails_a_camera_shows_in_its_picture(kind: str, metric: str, low: float, high: float) -> None:
    name = city_device("camera")
    cause = planted(kind, name, minutes=60, district=CITY)
    assert all(low <= v <= high for v in values(said(name, NOON, cause.end_ms, cause, district=CITY), metric))
    assert not any(low <= v <= high for v in values(said(name, NOON, cause.end_ms, district=CITY), metric))


@pytest.mark.parametrize("kind", ["exposed_garbage", "illegal_stall", "fire_lane_blocked", "crowd", "lorry"])
def test_what_is_in_the_picture_is_told_each_half_minute_and_that_it_is_gone(kind: str) -> None:
    name = city_device("camera")
    cause = planted(kind, name, minutes=20, district=CITY)
    events = of_lane(said(name, NOON, cause.end_ms + MINUTE_MS, cause, district=CITY), Lane.EVENT)
    assert [r.observed_at for r in events] == [*range(NOON, cause.end_ms, 30_000), cause.end_ms]
    told = [value for r in events for value in r.values.values()]
    assert told[-1] == 0.0
    assert max(told) > (0.7 if kind == "crowd" else 1100)


def test_a_night_without_a_lamp_is_dark_and_a_picture() -> None:
    name = city_device("camera")
    midnight = ORIGIN + 16 * HOUR_MS
    cause = planted("night", name, midnight, minutes=120, district=CITY)
    items = said(name, midnight, cause.end_ms, cause, district=CITY)
    assert all(0.03 < value < 0.12 for value in values(items, "brightness"))
    assert min(values(items, "motion")) > 0.0


# --- elevators ---


def codes_of(items: list[tuple[Lane, Reading]]) -> list[tuple[int, float, Reading]]:
    events = of_lane(items, Lane.EVENT)
    return [(r.observed_at, r.values["fault_code"], r) for r in events if r.values.get("fault_code")]


def test_a_healthy_elevator_rides_people_by_day_and_rests_at_night() -> None:
    floors = DISTRICT.floors["bld-01"]
    items = said("lift-0001", ORIGIN, ORIGIN + 2 * DAY_MS)
    telemetry = of_lane(items, Lane.TELEMETRY)
    assert codes_of(items) == []
    assert {r.values["moving"] for r in telemetry} == {0.0, 1.0}
    assert all(1 <= r.values["floor"] <= floors for r in telemetry)
    assert all((r.values["current_a"] > 3) == (r.values["moving"] == 1.0) for r in telemetry)
    at = {True: 0, False: 0}
    for r in telemetry:
        hour = (r.observed_at + 8 * HOUR_MS) % DAY_MS / HOUR_MS
        if hour < 5 or 7 <= hour < 9 or 17 <= hour < 20:
            at[hour < 5] += int(r.values["moving"])
    assert at[False] > 5 * at[True]


@pytest.mark.parametrize("name", ["lift-0001", "lift-0007", "lift-0012"])
def test_nobody_appears_in_or_vanishes_from_a_moving_or_closed_car(name: str) -> None:
    before = None
    for r in of_lane(said(name, ORIGIN, ORIGIN + DAY_MS), Lane.EVENT):
        now = (r.values["occupied"], r.values["door_closed"])
        if before is not None and before[0] != now[0]:
            assert now[1] == 0.0
        before = now


def test_it_says_when_it_begins_to_move_and_stops_and_rides_from_where_it_was() -> None:
    items = of_lane(said("lift-0003", NOON, NOON + 6 * HOUR_MS), Lane.TELEMETRY)
    turns = [r for before, r in pairwise(items) if before.values["moving"] != r.values["moving"]]
    assert len(turns) > 20
    standing = [(a.values["floor"], b.values["floor"]) for a, b in pairwise(items) if not a.values["moving"]]
    assert sum(one == other for one, other in standing) > 0.97 * len(standing)  # a few reports are missed


def test_a_trapped_passenger_stops_then_presses_the_button_within_forty_seconds() -> None:
    cause = planted("trapped", "lift-0001")
    items = said("lift-0001", NOON - MINUTE_MS, cause.end_ms + 2 * MINUTE_MS, cause)
    codes = codes_of(items)
    assert codes[0][1] == 4
    button = next(at for at, code, _ in codes if code == BUTTON)
    assert 20 * SECOND_MS <= button - NOON <= 40 * SECOND_MS
    for _, _, reading in codes:
        assert reading.values["occupied"] == 1.0
        assert list(reading.values)[-1] == "fault_code"  # behind its evidence
    moving = {r.observed_at: r.values["moving"] for r in of_lane(items, Lane.TELEMETRY)}
    assert all(not value for at, value in moving.items() if NOON <= at < cause.end_ms)
    assert any(value for at, value in moving.items() if at < NOON)
    cleared = [r for r in of_lane(items, Lane.EVENT) if r.observed_at >= cause.end_ms]
    assert cleared[0].values["fault_code"] == 0.0
    assert cleared[-1].values["occupied"] == 0.0


def test_in_a_retrofitted_car_it_shows_without_codes() -> None:
    name = city_device("elevator", "retrofit")
    cause = planted("trapped", name, district=CITY)
    items = said(name, NOON, cause.end_ms, cause, district=CITY)
    assert values(items, "fault_code") == values(items, "service_mode") == []
    assert set(values(items, "occupied")) <= {1.0}
    assert set(values(items, "moving")) == {0.0}


@pytest.mark.parametrize("kind", ["power_cut_occupied", "power_cut_empty"])
def test_a_power_cut_is_told_by_all_cars_and_the_button_by_occupied_ones_only(kind: str) -> None:
    cause = planted(kind, "lift-0001", minutes=20)
    assert bool(cause.occupied) == (kind == "power_cut_occupied")
    for name in DISTRICT.buildings["bld-01"]:
        items = said(name, NOON, cause.end_ms + 2 * MINUTE_MS, cause)
        codes = codes_of(items)
        assert codes[0][1] == MAINS_LOST
        assert codes[0][0] - NOON < 5 * SECOND_MS
        assert (BUTTON in [code for _, code, _ in codes]) == (name in cause.occupied)
        assert {r.values["occupied"] for _, code, r in codes if code != 40} == {float(name in cause.occupied)}
        assert 40 in [code for _, code, _ in codes]


def test_the_power_cut_with_empty_cars_finds_no_rider_on_the_way() -> None:
    for start in range(NOON, NOON + 2 * HOUR_MS, 7 * MINUTE_MS):
        cause = planted("power_cut_empty", "lift-0001", start)
        items = said("lift-0002", start, cause.end_ms, cause)
        assert {r.values["occupied"] for r in of_lane(items, Lane.EVENT)} == {0.0}


def test_a_door_failure_begins_at_least_four_times_in_about_eight_minutes() -> None:
    cause = planted("door_failure", "lift-0001", minutes=20)
    items = said("lift-0001", NOON, cause.end_ms + MINUTE_MS, cause)
    begins = [at for at, code, _ in codes_of(items) if code in (2, 3)]
    assert len(begins) >= 4
    assert begins[3] - begins[0] <= 8 * MINUTE_MS
    last = [r for r in of_lane(items, Lane.EVENT) if r.observed_at == cause.end_ms]
    assert last[0].values["fault_code"] == 0.0
    held = planted("loading", "lift-0001", minutes=10)
    assert len([c for _, c, _ in codes_of(said("lift-0001", NOON, held.end_ms, held)) if c in (2, 3)]) < 3


def test_an_inspection_shows_every_code_but_only_under_its_mode() -> None:
    cause = planted("inspection", "lift-0001")
    items = said("lift-0001", NOON, cause.end_ms + 2 * MINUTE_MS, cause)
    codes = codes_of(items)
    assert {code for _, code, _ in codes} >= {1, 2, 90}
    assert all(r.values["service_mode"] == 2.0 and r.values["occupied"] == 1.0 for _, _, r in codes)
    assert max(of_lane(items, Lane.EVENT), key=lambda r: r.observed_at).values["service_mode"] == 1.0


def test_codes_that_stay_and_a_car_that_moves() -> None:
    for kind, expected in (("lift_fault", {1.0, 6.0, 7.0, 8.0}), ("unintended_movement", {5.0})):
        cause = planted(kind, "lift-0001")
        codes = [code for _, code, _ in codes_of(said("lift-0001", NOON, cause.end_ms, cause))]
        assert len(set(codes)) == 1
        assert set(codes) <= expected


def test_rough_rides_shake_and_a_hot_room_is_hot() -> None:
    name = city_device("elevator", "controller")
    rough = planted("rough_ride", name, NOON, 240, district=CITY)
    items = of_lane(said(name, NOON, rough.end_ms, rough, district=CITY), Lane.TELEMETRY)
    assert all(r.values["vibration_rms_g"] > 0.1 for r in items if r.values["moving"])
    assert all(r.values["vibration_rms_g"] < 0.01 for r in items if not r.values["moving"])
    hot = planted("machine_room_hot", name, NOON, 120, district=CITY)
    assert max(values(said(name, NOON, hot.end_ms, hot, district=CITY), "temperature_c")) > 41
    assert max(values(said(name, ORIGIN, ORIGIN + 3 * DAY_MS, district=CITY), "temperature_c")) < 39


# --- schedule and truth ---


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_two_days_hold_all_kinds_apart_from_each_other(seed: int) -> None:
    district = build(seed)
    causes = Schedule(district, seed, ORIGIN).causes(ORIGIN, ORIGIN + 2 * DAY_MS)
    assert 110 <= len(causes) <= 130
    assert {cause.kind for cause in causes} == {kind.name for kind in KINDS if kind.zone_day}
    assert len({cause.id for cause in causes}) == len(causes)
    apart(district, causes)


def apart(district: District, causes: list[Cause]) -> None:
    areas = [areas_of(district, cause) for cause in causes]
    for number, one in enumerate(causes):
        for other in range(number + 1, len(causes)):
            if areas[number] & areas[other]:
                later = causes[other]
                assert one.end_ms + GAP_MS <= later.start_ms or later.end_ms + GAP_MS <= one.start_ms


def test_a_week_of_the_city_holds_hundreds_of_causes_and_look_alikes_of_every_kind() -> None:
    causes = Schedule(CITY, 11, ORIGIN).causes(ORIGIN, ORIGIN + 7 * DAY_MS)
    truths = [truth_of(cause, CITY) for cause in causes]
    assert sum(truth.lookalike for truth in truths) >= 300
    assert sum(not truth.lookalike for truth in truths) >= 300
    assert {cause.kind for cause in causes} == set(KIND)
    assert all(cause.end_ms + GAP_MS <= ORIGIN + 7 * DAY_MS for cause in causes)
    apart(CITY, causes)
    for cause in causes:
        device = CITY.devices[cause.centre]
        assert any(suits(kind, device) for kind in KINDS if kind.name == cause.kind)


def test_the_schedule_is_the_seeds_alone_and_knows_the_middle() -> None:
    day = (ORIGIN + DAY_MS, ORIGIN + 2 * DAY_MS)
    whole = Schedule(DISTRICT, 11, ORIGIN)
    whole.causes(ORIGIN, ORIGIN + DAY_MS)
    assert whole.causes(*day) == Schedule(DISTRICT, 11, ORIGIN).causes(*day)
    assert whole.causes(*day) != Schedule(DISTRICT, 12, ORIGIN).causes(*day)
    some = whole.causes(*day)[3]
    assert some in Schedule(DISTRICT, 11, ORIGIN).around(some.subjects, some.start_ms, some.start_ms + 1)
    assert some not in Schedule(DISTRICT, 11, ORIGIN).around(some.subjects, some.end_ms + 1, some.end_ms + 2, 0)


def test_a_gateway_is_offline_while_its_cause_lasts() -> None:
    schedule = Schedule(DISTRICT, 11, ORIGIN)
    cause = next(c for c in schedule.causes(ORIGIN, ORIGIN + DAY_MS) if c.kind == "gateway_offline")
    assert not schedule.offline(cause.centre, cause.start_ms - 1)
    assert schedule.offline(cause.centre, cause.start_ms)
    assert not schedule.offline(cause.centre, cause.end_ms)
    assert 4 * MINUTE_MS <= cause.end_ms - cause.start_ms <= 60 * MINUTE_MS


def test_the_demo_plants_its_causes_at_fixed_times_and_goes_on_with_others() -> None:
    fixed = demo(DISTRICT, 7, ORIGIN)
    expected = [("trapped", 12), ("knocked_over", 20), ("illegal_use", 45), ("mains_burst", 70),
                ("power_cut_occupied", 120), ("authorised_use", 150), ("gateway_offline", 240)]  # fmt: skip
    assert [(c.kind, (c.start_ms - ORIGIN) // SECOND_MS) for c in fixed] == expected
    assert len(next(c for c in fixed if c.kind == "power_cut_occupied").occupied) == 2
    assert len({area for c in fixed for area in areas_of(DISTRICT, c)}) == sum(
        len(areas_of(DISTRICT, c)) for c in fixed
    )
    in_the_city = demo(CITY, 7, ORIGIN)
    assert [(c.kind, (c.start_ms - ORIGIN) // SECOND_MS) for c in in_the_city] == expected
    apart(CITY, in_the_city)
    schedule = Schedule(DISTRICT, 7, ORIGIN, "demo")
    assert schedule.causes(ORIGIN, ORIGIN + 10 * MINUTE_MS) == fixed
    assert len(schedule.causes(ORIGIN + 10 * MINUTE_MS, ORIGIN + 3 * HOUR_MS)) >= 10


def test_the_truth_says_what_is_due_and_where() -> None:
    burst = truth_of(planted("mains_burst", "hyd-000005"), DISTRICT)
    assert (burst.due.case, burst.category, burst.unit, len(burst.subjects)) == (1, "water_main_burst", "water", 20)
    assert burst.place.cell == DISTRICT.devices["hyd-000005"].place.cell
    cut = planted("power_cut_occupied", "lift-0001")
    assert truth_of(cut, DISTRICT).due.rescues == cut.occupied
    offline = truth_of(planted("gateway_offline", "gw-02"), DISTRICT)
    assert (offline.due.case, offline.due.maintenance, offline.subjects) == (0, 1, ("gw-02",))
    for kind in ("authorised_use", "inspection", "power_cut_empty"):
        quiet = truth_of(planted(kind, "hyd-000001" if kind == "authorised_use" else "lift-0001"), DISTRICT)
        assert quiet.lookalike
        assert (quiet.due.case, quiet.due.rescues, quiet.due.maintenance, quiet.category) == (0, (), 0, None)


# --- live ---


def test_provisioning_asks_once_and_not_at_all_where_all_is_in_force(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    first = provision(layout, DISTRICT, NOON)
    provision(layout, DISTRICT, NOON + 5)  # before ingest has taken the first
    commands = [command for _, command in Mailbox(layout.mailbox("ingest")).take()[0]]
    assert [command.kind for command in commands] == ["registry", "ruleset"]
    assert layout.get_blob(commands[0].body["content"]) == encode_registry(DISTRICT.registry)
    layout.write_active(Active(str(first["registry"]), str(first["ruleset"])))
    for name, _ in Mailbox(layout.mailbox("ingest")).take()[0]:
        Mailbox(layout.mailbox("ingest")).done(name)
    assert provision(layout, DISTRICT, NOON + 9)["changed"] == []
    assert Mailbox(layout.mailbox("ingest")).take() == ([], [])


def test_the_diary_tells_a_cause_once_and_a_permit_before_its_use(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    schedule = Schedule(DISTRICT, 7, ORIGIN, "demo")
    for second in (0, 12, 13, 30, 90, 149):  # a fresh process each time
        diary = Diary(layout, schedule)
        diary.start()
        diary.step(ORIGIN + second * SECOND_MS)
    assert [truth.kind for truth in read_truth(layout.truth)] == [
        "trapped", "knocked_over", "illegal_use", "mains_burst", "power_cut_occupied"
    ]  # fmt: skip
    ((_, override),) = Mailbox(layout.mailbox("ingest")).take()[0]
    assert override.kind == "override"
    assert override.body["from_ms"] < ORIGIN + 150 * SECOND_MS < override.body["until_ms"]
    layout.truth.write_bytes(layout.truth.read_bytes() + b'{"id": "half')
    again = Diary(layout, schedule)
    again.start()
    again.step(ORIGIN + 151 * SECOND_MS)
    assert [truth.kind for truth in read_truth(layout.truth)][-1] == "authorised_use"


def test_an_unknown_gateway_is_refused_by_name() -> None:
    assert [gateway.id for gateway in chosen(DISTRICT, ["gw-02", "gw-02"])] == ["gw-02"]
    assert len(chosen(DISTRICT, [])) == 5
    with pytest.raises(UsageError, match="gw-99"):
        chosen(DISTRICT, ["gw-99"])


@contextmanager
def listening(port: int) -> Iterator[list[tuple[str, bytes]]]:
    """What gateways publish, as (channel, payload), from a real broker."""
    heard: list[tuple[str, bytes]] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, "listener")
    client.on_message = lambda _client, _data, message: heard.append(
        (message.topic.split("/", 3)[3], bytes(message.payload))
    )
    client.connect("127.0.0.1", port)
    client.subscribe("cb/v1/+/+/+", 1)
    client.loop_start()
    try:
        yield heard
    finally:
        client.loop_stop()


@contextmanager
def simulating(layout: Layout, clock: RunClock, port: int, gateway: str) -> Iterator[subprocess.Popen[bytes]]:
    """The real process, hosting one gateway."""
    layout.make()
    layout.write_run(Run(clock=clock, mqtt_port=port))
    argv = [sys.executable, "-m", "citybrain", "simulate", "--data", str(layout.root), "--gateway", gateway]
    with subprocess.Popen(argv) as process:
        try:
            yield process
        finally:
            end(process)


def test_the_process_speaks_through_a_real_broker_and_stops_when_told(tmp_path: Path, mosquitto: int) -> None:
    layout, now_ms = Layout(tmp_path / "data"), real_unix_ms()
    clock = RunClock(now_ms, now_ms)
    with listening(mosquitto) as heard, simulating(layout, clock, mosquitto, "gw-01") as process:
        eventually(lambda: {"gw-01/status", "gw-01/telemetry"} <= {channel for channel, _ in heard}, 20)
        eventually((layout.run / "simulate.heartbeat.json").exists)
        process.send_signal(signal.SIGTERM)
        began_s = monotonic_s()
        assert process.wait(5) == 0
        assert monotonic_s() - began_s < 2.0
    assert {channel.split("/")[0] for channel, _ in heard} == {"gw-01"}
    frame = next(payload for channel, payload in heard if channel.endswith("telemetry"))
    devices = {reading.device for reading in readings_of(open_message(frame))}
    assert devices <= {*DISTRICT.of_gateway("gw-01"), "gw-01"}


def test_a_gateway_loses_its_line_and_comes_back_as_scheduled(tmp_path: Path, mosquitto: int) -> None:
    layout, now_ms = Layout(tmp_path / "data"), real_unix_ms()
    clock = RunClock(now_ms, now_ms, 40.0)  # offline from 240 s for 5 min: after 6 s, for 7.5 s
    with listening(mosquitto) as heard, simulating(layout, clock, mosquitto, "gw-05"):

        def births() -> list[bool]:
            return [decode_status(payload).online for channel, payload in heard if channel == "gw-05/status"]

        eventually(lambda: births() == [True, False, True], 30, "the line going down and up again")


# --- docs ---


def row(kind: Kind) -> str:
    """A kind's line in docs/simulation.md."""
    strength = ", ".join(f"`{name}` {low:g}…{high:g}" for name, (low, high) in RANGES.get(kind.name, {}).items())
    due = {"case": "case", "rescue": "rescue", "maintenance": "maintenance order", "nothing": "–"}[kind.due]
    low, high = kind.minutes
    rates, minutes = f"{kind.zone_day:g}, {kind.city_day:g}", f"{low:g}–{high:g} min"
    return f"| `{kind.name}` | {kind.at} | {rates} | {minutes} | {strength or '–'} | {due} |"


def test_the_docs_have_every_kind_of_cause_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text()
    assert [kind.name for kind in KINDS if row(kind) not in text] == []


def test_a_lift_that_misses_reports_goes_on_telling_its_changes_and_a_revived_one_says_how_it_stands() -> None:
    """Else it would stand for minutes with somebody inside who has long left: a false rescue."""
    lift = next(device.id for device in CITY.registry.devices if "retrofit" in device.tags)
    missed = planted("missed_reports", lift, minutes=30, district=CITY)
    dead = planted("device_dead", lift, minutes=30, district=CITY)
    until = missed.end_ms + 5 * MINUTE_MS
    plain, fewer, none = (said(lift, NOON, until, *causes, district=CITY) for causes in ((), (missed,), (dead,)))

    def of(lane: Lane, told: list[tuple[Lane, Reading]]) -> list[tuple[int, dict[str, float]]]:
        return [(reading.observed_at, reading.values) for at, reading in told if at is lane]

    assert of(Lane.EVENT, fewer) == of(Lane.EVENT, plain)
    turned = [reading.values["moving"] for _, reading in plain if "moving" in reading.values]
    assert 1.0 in turned
    assert {at for at, values in of(Lane.TELEMETRY, plain) if values["moving"]} >= {
        at for at, values in of(Lane.TELEMETRY, fewer) if values["moving"]
    }
    assert 0 < len(of(Lane.TELEMETRY, fewer)) < len(of(Lane.TELEMETRY, plain))
    first, values = of(Lane.EVENT, none)[0]
    assert (first, set(values)) == (dead.end_ms, {"occupied", "door_closed"})
    assert not [at for at, _ in of(Lane.TELEMETRY, none) if at < dead.end_ms]
