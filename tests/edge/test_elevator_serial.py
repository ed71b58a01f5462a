"""Lift controllers on pseudo-terminals: what they tell arrives once, at once, whatever stands on the line beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.errors import ConfigError
from citybrain.model import Lane
from edge.codes import codes_of, known_tables, load_table
from edge.driver import Quality
from edge.frames import START, Deframer, Frame, Succession
from edge.lifts.controllers import ADAPTERS, ALARM_HOLD_MS, Adapter, Occurrence, RunState, Said, car
from simulators.lines.elevator import IDLE, Line
from tests.line_site import LineSite

CODES = [0, 1, 8, 40, 90]
STATES = st.builds(
    RunState, st.integers(0, 7), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans(), st.integers(-9, 99),
    st.sampled_from(CODES),
)  # fmt: skip
FRAMES = st.builds(Frame, st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=16))
# Noise that likes to look like a frame's beginning.
NOISE = st.one_of(st.binary(max_size=40), st.builds(lambda tail: START + tail, st.binary(max_size=20)))


# --- frames ---


@given(st.lists(st.tuples(NOISE, FRAMES), max_size=8), NOISE, st.integers(1, 7))
def test_every_frame_is_found_between_any_noise(parts: list[tuple[bytes, Frame]], tail: bytes, step: int) -> None:
    stream = b"".join(noise + frame.encode() for noise, frame in parts) + tail
    deframer, found, counted = Deframer(16), [], 0
    for at in range(0, len(stream), step):
        heard = deframer.feed(stream[at : at + step])
        found += heard.frames
        counted += heard.noise
    last = deframer.rest()
    found += last.frames
    counted += last.noise
    assert found == [frame for _, frame in parts]
    assert counted == sum(len(noise) for noise, _ in parts) + len(tail)  # each byte is a frame's or counted


@given(FRAMES, st.data())
def test_no_frame_with_damaged_bits_is_taken(frame: Frame, data: st.DataObject) -> None:
    whole = bytearray(frame.encode())
    bits = data.draw(st.sets(st.integers(0, len(whole) * 8 - 1), min_size=1, max_size=3))
    for bit in bits:
        whole[bit // 8] ^= 1 << bit % 8
    deframer = Deframer(16)
    taken = deframer.feed(bytes(whole)).frames + deframer.rest().frames
    assert frame not in taken
    assert not [one for one in taken if one.station == frame.station and one.payload == frame.payload]


def test_a_frame_behind_a_half_one_is_there_with_its_own_last_byte() -> None:
    deframer, frame = Deframer(16), Frame(4, 1, 2, b"\x01\x00\x5a")
    assert deframer.feed(frame.encode()[:7]).frames == []
    heard = deframer.feed(frame.encode())
    assert heard.frames == [frame]
    assert (heard.spoilt, heard.noise) == (1, 7)


def test_missing_and_repeated_numbers() -> None:
    known = Succession()
    numbers = [250, 251, 254, 255, 0, 3]
    assert [known.missed(Frame(1, 1, number, b"")) for number in numbers] == [0, 0, 2, 0, 0, 2]
    assert known.repeated(Frame(1, 1, 254, b""))
    assert not known.repeated(Frame(1, 1, 254, b"other"))
    assert known.missed(Frame(1, 1, 1, b"")) == 0  # it began anew


# --- regions ---


@pytest.mark.parametrize("region", sorted(ADAPTERS))
@given(state=STATES, kind=st.sampled_from(["fault", "event", "alarm"]), code=st.integers(1, 99), begun=st.booleans())
def test_each_region_reads_what_it_writes(region: str, state: RunState, kind: str, code: int, begun: bool) -> None:
    adapter: Adapter = ADAPTERS[region]()
    for told in (state, Occurrence(kind, code, begun)):
        number, payload = adapter.write(told)
        assert adapter.read(Frame(number, 1, 0, payload)) == told


@pytest.mark.parametrize("region", sorted(ADAPTERS))
@given(st.integers(0, 255), st.binary(max_size=16))
def test_any_payload_is_understood_or_refused(region: str, kind: int, payload: bytes) -> None:
    try:
        told = ADAPTERS[region]().read(Frame(kind, 1, 0, payload))
    except ValueError:
        return
    assert isinstance(told, RunState | Occurrence)


def test_two_regions_number_a_trapped_passenger_differently_and_the_platform_hears_one_number() -> None:
    codes = {region: codes_of(region) for region in ("regional_93", "regional_11")}
    trapped = {region: [c.code for c in table.values() if c.number == 93] for region, table in codes.items()}
    assert trapped == {"regional_93": [93], "regional_11": [11]}
    assert 93 not in codes["regional_11"]
    assert all(table[90].kind == "alarm" for table in codes.values())


@pytest.mark.parametrize("name", known_tables())
def test_a_table_names_its_source_and_confidence(name: str) -> None:
    table = load_table(name)
    assert table.source
    assert table.confidence in "HMU"
    assert {one.zh for one in table.codes} & {one.en for one in table.codes} == set()


# --- a car ---


def numbers(said: Said) -> list[float]:
    return [one.values["fault_code"] for _, one in said if "fault_code" in one.values]


def test_a_lost_code_frame_is_mended_by_the_next_run_state() -> None:
    lift = car("lift-1", ADAPTERS["regional_93"](), 60_000, 600_000)
    assert numbers(lift.state(IDLE, 0)) == [0]
    stuck = RunState(1, 0, door_zone=False, door_closed=True, occupied=True, floor=3, active=93)
    said = lift.state(stuck, 1000)
    assert numbers(said) == [93]
    assert [lane for lane, one in said if "fault_code" in one.values] == [Lane.EVENT]
    assert numbers(lift.occurrence(Occurrence("alarm", 93), 1100)) == []  # the same, a second later
    assert numbers(lift.state(IDLE, 2000 + ALARM_HOLD_MS)) == [0]


def test_the_end_of_a_pressed_button_is_told_late_enough_to_be_judged() -> None:
    lift = car("lift-1", ADAPTERS["regional_93"](), 60_000, 600_000)
    lift.state(IDLE, 0)
    assert numbers(lift.occurrence(Occurrence("alarm", 90), 1000)) == [90]
    assert lift.occurrence(Occurrence("alarm", 90, begun=False), 1500) == []
    assert numbers(lift.state(IDLE, 2000)) == []
    assert lift.tick(30_000) == []
    assert numbers(lift.occurrence(Occurrence("alarm", 90), 31_000)) == [90]  # pressed again
    assert lift.occurrence(Occurrence("alarm", 90, begun=False), 31_500) == []
    assert lift.tick(31_000 + ALARM_HOLD_MS - 1) == []
    assert numbers(lift.tick(31_000 + ALARM_HOLD_MS)) == [0]
    assert lift.tick(31_000 + 2 * ALARM_HOLD_MS) == []


def test_zero_says_that_nothing_holds_and_not_that_something_ended() -> None:
    lift = car("lift-1", ADAPTERS["regional_93"](), 60_000, 600_000)
    lift.state(IDLE, 0)
    assert numbers(lift.occurrence(Occurrence("fault", 1), 1)) == [1]
    assert numbers(lift.occurrence(Occurrence("fault", 4), 2)) == [4]
    assert numbers(lift.occurrence(Occurrence("fault", 1, begun=False), 3)) == []
    assert numbers(lift.occurrence(Occurrence("fault", 4, begun=False), 4)) == [0]
    assert numbers(lift.occurrence(Occurrence("event", 41), 5)) == [41]


# --- on the line ---


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., tuple[Line, LineSite]]]:
    made: list[tuple[Line, LineSite]] = []

    def started(
        region: str = "regional_93", cars: int = 1, baud: int = 9600, read_baud: int = 0
    ) -> tuple[Line, LineSite]:
        line = Line(tmp_path / f"lifts-{len(made)}", region, cars, baud)
        line.talker.start()
        devices = ", ".join(f"{{device: lift-{n}, station: {n}}}" for n in range(1, cars + 1))
        site = LineSite(
            f"driver: elevator_serial\nport: {line.talker.wire.port}\nbaud: {read_baud or baud}\nregion: {region}\n"
            f"silence: 1s\ndevices: [{devices}]"
        )
        made.append((line, site))
        return line, site

    yield started
    for line, site in made:
        site.hosts.stop(0)
        line.talker.stop()


Begin = Callable[..., tuple[Line, LineSite]]


@pytest.mark.parametrize(("region", "code"), [("regional_93", 93), ("regional_11", 11)])
def test_a_trapped_passenger_is_an_event_with_its_evidence(begin: Begin, region: str, code: int) -> None:
    line, site = begin(region, cars=2)
    site.until(lambda: site.quality("lift-1") is Quality.GOOD and site.quality("lift-2") is Quality.GOOD)
    line.set(1, floor=7, occupied=True, door_zone=False)
    site.until(lambda: site.of("lift-1", "floor")[-1:] == [7.0])
    line.say(1, "alarm", code)
    site.until(lambda: 93.0 in site.of("lift-1", "fault_code"))
    assert {
        "occupied": 1,
        "door_closed": 1,
        "service_mode": 1,
        "trapped_certainty": 1,
        "fault_code": 93,
    } in site.events("lift-1")
    assert set(site.of("lift-2", "fault_code")) == {0.0}
    assert [list(one)[-1] for one in site.events("lift-1") if "fault_code" in one] == ["fault_code"] * 2


def test_what_does_not_change_is_not_told_again(begin: Begin) -> None:
    line, site = begin()
    for floor in (1, 2, 3):
        line.set(1, floor=floor)
        site.until(lambda floor=floor: float(floor) in site.of("lift-1", "floor"))  # type: ignore[misc]
    assert site.of("lift-1", "floor") == [1.0, 2.0, 3.0]
    assert site.of("lift-1", "moving") == [0.0]
    assert site.of("lift-1", "door_closed") == [1.0]


@pytest.mark.parametrize("fault", ["crc", "half", "noise"])
def test_damaged_frames_are_counted_and_said_and_the_line_comes_back(begin: Begin, fault: str) -> None:
    line, site = begin()
    other, beside = begin()
    site.until(lambda: site.quality("lift-1") is Quality.GOOD)
    line.talker.fault = fault  # type: ignore[assignment]
    site.until(lambda: site.quality("lift-1") is Quality.GARBLED, what="it is called garbled")
    if fault != "noise":
        assert site.dropped({"crc": "bad_checksum", "half": "half_frame"}[fault]) >= 3
    assert site.dropped("noise_bytes") > 0
    line.talker.fault = "dead"
    site.until(lambda: site.quality("lift-1") is Quality.NO_ANSWER, what="silence behind noise is silence")
    other.say(1, "fault", 1)
    beside.until(lambda: 1.0 in beside.of("lift-1", "fault_code"))
    assert beside.quality("lift-1") is Quality.GOOD
    line.talker.fault = "preceded"
    site.until(lambda: site.quality("lift-1") is Quality.GOOD, what="it is good again between noise")


def test_a_wrong_speed_is_said(begin: Begin) -> None:
    line, site = begin(baud=9600, read_baud=19200)
    site.until(lambda: site.quality("lift-1") is Quality.GARBLED)
    assert line.talker.wire.far_baud == 19200
    assert site.of("lift-1", "floor") == []
    assert any("is 19200 baud right?" in why for why in site.hosts.reasons().values())


def test_repeated_and_missing_frames_are_counted(begin: Begin) -> None:
    line, site = begin()
    site.until(lambda: site.of("lift-1", "floor"))
    line.talker.fault = "repeated"
    site.until(lambda: site.dropped("repeated_frame") >= 3)
    assert site.of("lift-1", "fault_code") == [0.0]
    line.talker.fault = ""
    line.talker.skip(1, 5)
    site.until(lambda: site.dropped("missed_frame") == 5)
    line.talker.say((9, 1, b""))
    site.until(lambda: site.dropped("unknown_station") == 1)


def test_a_code_of_another_region_is_counted_and_makes_the_car_odd(begin: Begin) -> None:
    line, site = begin("regional_93")
    site.until(lambda: site.quality("lift-1") is Quality.GOOD)
    line.say(1, "alarm", 11)
    site.until(lambda: site.quality("lift-1") is Quality.IMPLAUSIBLE)
    assert site.dropped("unknown_code") == 1
    line.say(1, "alarm", 90)  # the rest goes on
    site.until(lambda: 90.0 in site.of("lift-1", "fault_code"))
    line.talker.say((1, 1, b"\x00"))
    site.until(lambda: site.dropped("bad_payload") == 1)


def test_payloads_of_another_region_ask_whether_the_region_is_right(begin: Begin) -> None:
    line, site = begin("regional_93")

    def asked() -> bool:
        line.talker.say((1, 1, b"\x00" * 9))
        return "is region regional_93 right?" in site.hosts.reasons().get("lift-1", "")

    site.until(asked)


def test_an_unplugged_adapter_and_a_silent_controller(begin: Begin) -> None:
    line, site = begin()
    site.until(lambda: site.quality("lift-1") is Quality.GOOD)
    line.talker.fault = "dead"
    site.until(lambda: site.quality("lift-1") is Quality.NO_ANSWER)
    line.talker.unplug()
    site.until(lambda: site.quality("lift-1") is Quality.UNPLUGGED)
    line.talker.fault = ""
    line.set(1, floor=4)
    line.talker.plug()
    site.until(lambda: site.quality("lift-1") is Quality.GOOD)
    site.until(lambda: site.of("lift-1", "floor")[-1] == 4.0)
    assert site.counters.values["restarts_total{driver=line}"] == 0  # the driver mends it itself


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("region: atlantis", "region: 'atlantis' is none of gbt24476_2017, regional_11, regional_93"),
        ("devices: [{device: a, station: 1}, {device: b, station: 1}]", "a station stands there twice"),
        ("devices: [{device: a, station: 300}]", "station: expected 0 to 255, got 300"),
        ("devices: []", "devices: expected at least one"),
        ("baud: 10", "baud: expected 300 to 4000000, got 10"),
        ("spead: 9600", "unknown field 'spead'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_line(change: str, expected: str) -> None:
    lines = {"port": "/dev/ttyUSB0", "region": "regional_93", "devices": "[{device: a, station: 1}]"}
    name, _, value = change.partition(": ")
    text = "\n".join(f"{key}: {given}" for key, given in (lines | {name: value}).items())
    with pytest.raises(ConfigError, match=r"gateway\.yaml:") as caught:
        LineSite(f"driver: elevator_serial\n{text}")
    assert expected in str(caught.value)


def test_the_counterpart_on_the_command_line_is_understood(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "simulators.lines.elevator", "--cars", "2", "--region", "regional_11"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with closing(process.stdin):
            port = json.loads(process.stdout.readline())["port"]
            site = LineSite(
                f"driver: elevator_serial\nport: {port}\nregion: regional_11\n"
                "devices: [{device: a, station: 1}, {device: b, station: 2}]"
            )
            site.until(lambda: site.quality("a") is Quality.GOOD and site.quality("b") is Quality.GOOD)
            site.hosts.stop(0)
        assert process.wait(10) == 0
