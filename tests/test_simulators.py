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
from citybrain.wire import decode_status, open_message, readings_of
from simulators.district import District, build
from simulators.elevators import BUTTON, MAINS_LOST, Lift
from simulators.faults import GAP_MS, KIND, Cause, Schedule, area_of, demo, make, read_truth, truth_of
from simulators.noise import Noise
from simulators.sensors import CATCH_UP_MS, FAST_GATEWAY, FAST_MS, Sensors
from simulators.simulate import Diary, chosen, provision
from simulators.water import Hydrant
from streams.registry import encode_registry
from tests.conftest import end, eventually

ORIGIN = 1_767_225_600_000
NOON = ORIGIN + 4 * HOUR_MS  # the district keeps UTC+8
DISTRICT = build(11)


def planted(kind: str, centre: str, start_ms: int = NOON, minutes: float = 30, seed: int = 1) -> Cause:
    return make(random.Random(seed), DISTRICT, kind, (start_ms, start_ms + round(minutes * MINUTE_MS)), centre)


def hydrant(name: str = "hyd-000001", district: District = DISTRICT) -> Hydrant:
    device = district.devices[name]
    return Hydrant(
        district.seed, device, {other: district.distance_m(name, other) for other in district.zones[device.zone]}
    )


def lift(name: str = "lift-0001") -> Lift:
    device = DISTRICT.devices[name]
    return Lift(DISTRICT.seed, device, DISTRICT.floors[device.building])


def sensors(gateway: str = "gw-01", mark: Path | None = None, seed: int = 11) -> Sensors:
    return Sensors(DISTRICT, gateway, Schedule(DISTRICT, seed, ORIGIN), mark)


def of_lane(items: list[tuple[Lane, Reading]], lane: Lane) -> list[Reading]:
    return [reading for found, reading in items if found is lane]


# --- noise ---


def test_noise_is_uniform_and_normal_enough() -> None:
    noise = Noise(7, "any")
    uniform = [noise.uniform(n) for n in range(20_000)]
    normal = [noise.normal(n) for n in range(20_000)]
    assert abs(sum(uniform) / len(uniform) - 0.5) < 0.01
    assert abs(sum(normal) / len(normal)) < 0.03
    assert abs(sum(n * n for n in normal) / len(normal) - 1.0) < 0.03
    assert noise.bits(5) != Noise(7, "other").bits(5) != Noise(8, "other").bits(5)


# --- time ---


@settings(max_examples=15, deadline=None)
@given(
    start=st.integers(0, 2 * DAY_MS),
    cuts=st.lists(st.integers(1, 20 * MINUTE_MS), min_size=1, max_size=4, unique=True),
    gateway=st.sampled_from(["gw-01", "gw-04"]),
)
def test_any_moment_is_the_same_whoever_asks_from_when(start: int, cuts: list[int], gateway: str) -> None:
    begin, end = ORIGIN + start, ORIGIN + start + 20 * MINUTE_MS
    times = [begin, *sorted(begin + cut for cut in cuts), end]
    parts = [
        item
        for low, high in pairwise(times)
        for item in sensors(gateway).between(low, high)  # a fresh simulator each time
    ]
    assert parts == sensors(gateway).between(begin, end)


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
        readings = of_lane(hydrant(name).reports(ORIGIN, ORIGIN + 2 * DAY_MS, ()), Lane.TELEMETRY)
        pressures = [reading.values["pressure_mpa"] for reading in readings]
        assert 0.20 < min(pressures) < max(pressures) < 0.37
        assert max(reading.values["flow_lps"] for reading in readings) < 0.1
        assert min(reading.values["battery_v"] for reading in readings) > 3.35
        night = [r.values["pressure_mpa"] for r in readings if 18 <= r.observed_at % DAY_MS / HOUR_MS < 20]
        peak = [r.values["pressure_mpa"] for r in readings if 11 <= r.observed_at % DAY_MS / HOUR_MS < 12]
        assert sum(night) / len(night) - sum(peak) / len(peak) > 0.02  # people sleep; people cook


def test_a_few_reports_are_missed_and_some_come_twice() -> None:
    readings = of_lane(hydrant().reports(ORIGIN, ORIGIN + 2 * DAY_MS, ()), Lane.TELEMETRY)
    distinct = {reading.observed_at for reading in readings}
    assert 0.008 < 1 - len(distinct) / (2 * DAY_MS / MINUTE_MS) < 0.025
    assert 0 < len(readings) - len(distinct) < 0.015 * len(readings)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), hour=st.integers(0, 23), zone=st.integers(1, 10))
def test_a_burst_takes_at_least_five_neighbours_below_the_limit_and_the_nearest_most(
    seed: int, hour: int, zone: int
) -> None:
    members = DISTRICT.zones[f"zone-{zone:02d}"]
    burst = planted("mains_burst", members[seed % 20], ORIGIN + hour * HOUR_MS, 40, seed)
    assert set(burst.subjects) == set(members)
    after = burst.start_ms + MINUTE_MS
    pressures = {name: hydrant(name).state(after, (burst,)).pressure_mpa for name in members}
    assert sum(pressure < 0.135 for pressure in pressures.values()) >= 5
    assert pressures[burst.centre] <= sorted(pressures.values())[1] + 0.01
    assert hydrant(members[0]).state(burst.end_ms + 1, (burst,)).pressure_mpa > 0.2


def test_a_hydrant_in_another_zone_does_not_feel_the_burst() -> None:
    burst = planted("mains_burst", "hyd-000001")
    assert "hyd-000021" not in burst.subjects


def test_low_pressure_is_low_and_comes_back() -> None:
    cause = planted("low_pressure", "hyd-000001")
    one = hydrant()
    assert 0.08 <= one.state(NOON + 5 * MINUTE_MS, (cause,)).pressure_mpa <= 0.12
    assert one.state(cause.end_ms, (cause,)).pressure_mpa > 0.2


def test_a_knocked_over_hydrant_lies_flows_and_reports_every_ten_seconds() -> None:
    cause = planted("knocked_over", "hyd-000001", minutes=60)
    items = hydrant().reports(NOON - MINUTE_MS, cause.end_ms + MINUTE_MS, (cause,))
    tilts = [reading for reading in of_lane(items, Lane.EVENT) if reading.observed_at in (NOON, cause.end_ms)]
    assert 40 <= tilts[0].values["tilt_deg"] <= 91
    assert tilts[1].values["tilt_deg"] < 3
    lying = [r.observed_at for r in of_lane(items, Lane.TELEMETRY) if NOON < r.observed_at < cause.end_ms]
    assert len(set(lying)) > 0.97 * 360
    flows = [r.values["flow_lps"] for r in of_lane(items, Lane.TELEMETRY)]
    assert max(flows) > 7
    assert min(r.values["pressure_mpa"] for r in of_lane(items, Lane.TELEMETRY)) > 0.15


def test_authorised_use_looks_exactly_like_illegal_use() -> None:
    illegal, permitted = planted("illegal_use", "hyd-000001", minutes=10), planted("authorised_use", "hyd-000001")
    same = Cause("x", "authorised_use", illegal.start_ms, illegal.end_ms, illegal.centre, illegal.subjects,
                 illegal.strength)  # fmt: skip
    span = NOON - MINUTE_MS, illegal.end_ms + MINUTE_MS
    assert hydrant().reports(*span, (illegal,)) == hydrant().reports(*span, (same,))
    items = hydrant().reports(*span, (illegal,))
    flowing = [r for r in of_lane(items, Lane.TELEMETRY) if r.values["flow_lps"] > 0.5]
    assert all(4.5 < r.values["flow_lps"] < 13 for r in flowing[1:-1])
    assert [r.values["cap_open"] for r in of_lane(items, Lane.EVENT)][:2] == [1.0, 0.0]
    assert permitted.permit[0] < permitted.start_ms < permitted.end_ms < permitted.permit[1]


def test_a_dying_battery_passes_the_limit_when_its_cause_begins() -> None:
    cause = planted("battery_low", "hyd-000001", minutes=120)
    one = hydrant()
    assert one.state(NOON - 5 * MINUTE_MS, (cause,)).battery_v > 3.2
    assert one.state(NOON + 15 * MINUTE_MS, (cause,)).battery_v < 3.15
    assert one.state(cause.end_ms + 1, (cause,)).battery_v > 3.35


# --- elevators ---


def codes_of(items: list[tuple[Lane, Reading]]) -> list[tuple[int, float, Reading]]:
    events = of_lane(items, Lane.EVENT)
    return [(r.observed_at, r.values["fault_code"], r) for r in events if r.values.get("fault_code")]


def test_a_healthy_elevator_rides_people_by_day_and_rests_at_night() -> None:
    one = lift()
    items = one.reports(ORIGIN, ORIGIN + DAY_MS, ())
    telemetry = of_lane(items, Lane.TELEMETRY)
    assert codes_of(items) == []
    assert {r.values["moving"] for r in telemetry} == {0.0, 1.0}
    assert all(1 <= r.values["floor"] <= one.floors for r in telemetry)
    assert all((r.values["current_a"] > 3) == (r.values["moving"] == 1.0) for r in telemetry)
    at = {True: 0, False: 0}
    for r in telemetry:
        hour = (r.observed_at + 8 * HOUR_MS) % DAY_MS / HOUR_MS
        if hour < 5 or 7 <= hour < 9 or 17 <= hour < 20:
            at[hour < 5] += int(r.values["moving"])
    assert at[False] > 5 * at[True]


def test_nobody_appears_in_or_vanishes_from_a_moving_or_closed_car() -> None:
    one = lift("lift-0007")
    before = None
    for r in of_lane(one.reports(ORIGIN, ORIGIN + DAY_MS, ()), Lane.EVENT):
        now = (r.values["occupied"], r.values["door_closed"])
        if before is not None and before[0] != now[0]:
            assert now[1] == 0.0
        before = now


def test_a_trapped_passenger_stops_then_presses_the_button_within_forty_seconds() -> None:
    cause = planted("trapped", "lift-0001")
    items = lift().reports(NOON - MINUTE_MS, cause.end_ms + 2 * MINUTE_MS, (cause,))
    said = codes_of(items)
    assert said[0][1] == 4
    button = next(at for at, code, _ in said if code == BUTTON)
    assert 20 * SECOND_MS <= button - NOON <= 40 * SECOND_MS
    for _, _, reading in said:
        assert reading.values["occupied"] == 1.0
        assert list(reading.values)[-1] == "fault_code"  # behind its evidence
    moving = {r.observed_at: r.values["moving"] for r in of_lane(items, Lane.TELEMETRY)}
    assert all(not value for at, value in moving.items() if NOON <= at < cause.end_ms)
    assert any(value for at, value in moving.items() if at < NOON)
    cleared = [r for r in of_lane(items, Lane.EVENT) if r.observed_at >= cause.end_ms]
    assert cleared[0].values["fault_code"] == 0.0
    assert cleared[-1].values["occupied"] == 0.0


@pytest.mark.parametrize("kind", ["power_cut_occupied", "power_cut_empty"])
def test_a_power_cut_is_told_by_all_cars_and_the_button_by_occupied_ones_only(kind: str) -> None:
    cause = planted(kind, "lift-0001", minutes=20)
    assert bool(cause.occupied) == (kind == "power_cut_occupied")
    for name in DISTRICT.buildings["bld-01"]:
        items = lift(name).reports(NOON, cause.end_ms + 2 * MINUTE_MS, (cause,))
        said = codes_of(items)
        assert said[0][1] == MAINS_LOST
        assert said[0][0] - NOON < 5 * SECOND_MS
        assert (BUTTON in [code for _, code, _ in said]) == (name in cause.occupied)
        assert {r.values["occupied"] for _, code, r in said if code != 40} == {float(name in cause.occupied)}
        assert 40 in [code for _, code, _ in said]


def test_the_power_cut_with_empty_cars_finds_no_rider_on_the_way() -> None:
    for start in range(NOON, NOON + 2 * HOUR_MS, 7 * MINUTE_MS):
        cause = planted("power_cut_empty", "lift-0001", start)
        items = lift("lift-0002").reports(start, cause.end_ms, (cause,))
        assert {r.values["occupied"] for r in of_lane(items, Lane.EVENT)} == {0.0}


def test_a_door_failure_begins_at_least_four_times_in_about_eight_minutes() -> None:
    cause = planted("door_failure", "lift-0001", minutes=20)
    items = lift().reports(NOON, cause.end_ms + MINUTE_MS, (cause,))
    begins = [at for at, code, _ in codes_of(items) if code in (2, 3)]
    assert len(begins) >= 4
    assert begins[3] - begins[0] <= 8 * MINUTE_MS
    last = [r for r in of_lane(items, Lane.EVENT) if r.observed_at == cause.end_ms]
    assert last[0].values["fault_code"] == 0.0


def test_an_inspection_shows_every_code_but_only_under_its_mode() -> None:
    cause = planted("inspection", "lift-0001")
    items = lift().reports(NOON, cause.end_ms + 2 * MINUTE_MS, (cause,))
    said = codes_of(items)
    assert {code for _, code, _ in said} >= {1, 2, 90}
    assert all(r.values["service_mode"] == 2.0 and r.values["occupied"] == 1.0 for _, _, r in said)
    assert max(of_lane(items, Lane.EVENT), key=lambda r: r.observed_at).values["service_mode"] == 1.0


# --- schedule and truth ---


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_two_days_hold_all_kinds_apart_from_each_other(seed: int) -> None:
    district = build(seed)
    causes = Schedule(district, seed, ORIGIN).causes(ORIGIN, ORIGIN + 2 * DAY_MS)
    assert 60 <= len(causes) <= 100
    assert {cause.kind for cause in causes} == set(KIND)
    assert len({cause.id for cause in causes}) == len(causes)
    for number, one in enumerate(causes):
        for other in causes[number + 1 :]:
            if area_of(district, one.centre) & area_of(district, other.centre):
                assert one.end_ms + GAP_MS <= other.start_ms or other.end_ms + GAP_MS <= one.start_ms


def test_the_schedule_is_the_seeds_alone_and_knows_the_middle() -> None:
    day = (ORIGIN + DAY_MS, ORIGIN + 2 * DAY_MS)
    whole = Schedule(DISTRICT, 11, ORIGIN)
    whole.causes(ORIGIN, ORIGIN + DAY_MS)
    assert whole.causes(*day) == Schedule(DISTRICT, 11, ORIGIN).causes(*day)
    assert whole.causes(*day) != Schedule(DISTRICT, 12, ORIGIN).causes(*day)
    late = Schedule(DISTRICT, 11, ORIGIN)
    some = whole.causes(*day)[3]
    late.advance(some.start_ms)
    assert some in late.touching(some.centre)


def test_a_gateway_is_offline_while_its_cause_lasts() -> None:
    schedule = Schedule(DISTRICT, 11, ORIGIN)
    cause = next(c for c in schedule.causes(ORIGIN, ORIGIN + DAY_MS) if c.kind == "gateway_offline")
    schedule.advance(cause.start_ms)
    assert not schedule.offline(cause.centre, cause.start_ms - 1)
    assert schedule.offline(cause.centre, cause.start_ms)
    assert not schedule.offline(cause.centre, cause.end_ms)
    assert 10 * MINUTE_MS <= cause.end_ms - cause.start_ms <= 60 * MINUTE_MS


def test_the_demo_plants_its_causes_at_fixed_times_and_goes_on_with_others() -> None:
    fixed = demo(DISTRICT, 7, ORIGIN)
    expected = [("trapped", 12), ("knocked_over", 20), ("illegal_use", 45), ("mains_burst", 70),
                ("power_cut_occupied", 120), ("authorised_use", 150), ("gateway_offline", 240)]  # fmt: skip
    assert [(c.kind, (c.start_ms - ORIGIN) // SECOND_MS) for c in fixed] == expected
    assert len(next(c for c in fixed if c.kind == "power_cut_occupied").occupied) == 2
    assert len({area for c in fixed for area in area_of(DISTRICT, c.centre)}) == sum(
        len(area_of(DISTRICT, c.centre)) for c in fixed
    )
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
    clock = RunClock(now_ms, now_ms - 100_000 // 60, 60.0)  # fast, and 100 s in: offline from 240 s for 5 min
    with listening(mosquitto) as heard, simulating(layout, clock, mosquitto, "gw-05"):

        def births() -> list[bool]:
            return [decode_status(payload).online for channel, payload in heard if channel == "gw-05/status"]

        eventually(lambda: births() == [True, False, True], 30, "the line going down and up again")
