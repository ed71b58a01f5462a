"""Modbus RTU on real pseudo-terminals: what goes wrong with one device or line is named, and harms no other."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from citybrain.clock import system_clock, wait_s
from citybrain.config import Duration, convert, parse_yaml
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.drivers.modbus import Station, Trouble
from edge.drivers.modbus_rtu import Config, Heard, SerialLine, understand
from edge.drivers.registers import Block, Register
from edge.drivers.unanswered import FORGET
from edge.host import Configured, Hosts
from simulators.lines.modbus import RtuBus, Slave, hydrant
from simulators.lines.wire import resampled
from tests.conftest import eventually

CONFIG = """\
port: {port}
baud: 115200
interval: 200ms
timeout: 150ms
devices:
  - {{device: hyd-1, unit_id: 1, map: hydrant}}
  - {{device: hyd-2, unit_id: 2, map: hydrant}}
  - {{device: hyd-3, unit_id: 3, map: hydrant}}
"""


def configured(text: str) -> Config:
    value, lines = parse_yaml(text, "gateway.yaml")
    return convert(value, Config, lines)


class Site:
    """A line with three hydrants, the driver on it under its supervisor, and what it has given."""

    def __init__(self, folder: Path, baud: int = 115_200, text: str = CONFIG, *, echo: bool = False) -> None:
        self.bus = RtuBus(folder / "ttyUSB0", [hydrant(unit_id) for unit_id in (1, 2, 3)], baud, echo=echo)
        self.bus.start()
        config = configured(text.format(port=self.bus.wire.port))
        self.counters = Counters("gateway")
        self.hosts = Hosts([Configured("bus-0", "modbus_rtu", config)], self.counters, system_clock())
        self.hosts.start()
        self.given: list[tuple[Lane, Reading]] = []

    def until(self, holds: Callable[[], object], what: str, within_s: float = 10.0) -> None:
        def looked() -> object:
            self.given += self.hosts.poll(system_clock().now_ms())
            return holds()

        eventually(looked, within_s, what)

    def amount(self, device: str) -> int:
        return sum(one.device == device and "battery_v" in one.values for _, one in self.given)

    def quality(self, device: str) -> Quality | None:
        return self.hosts.qualities().get(device)

    def close(self) -> None:
        self.hosts.stop(0)
        self.bus.stop()


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.close()


@pytest.fixture
def site(tmp_path: Path, sites: list[Site]) -> Site:
    sites.append(Site(tmp_path))
    return sites[0]


def all_good(site: Site) -> bool:
    """Whether all are good and have told their first values and events."""
    return all(site.quality(f"hyd-{unit}") is Quality.GOOD and site.amount(f"hyd-{unit}") for unit in (1, 2, 3))


def test_values_come_in_their_units(site: Site) -> None:
    site.until(lambda: all_good(site), "all good")
    given = {lane: one.values for lane, one in reversed(site.given) if one.device == "hyd-2" and len(one.values) > 1}
    assert given[Lane.TELEMETRY] == pytest.approx(
        {"pressure_mpa": 0.312, "temperature_c": 12.0, "battery_v": 3.6, "water_present": 1, "flow_lps": 0}
    )
    assert given[Lane.EVENT] == pytest.approx({"tilt_deg": 0.5, "cap_open": 0, "impact_g": 0, "hammer_mpa": 0})


@pytest.mark.parametrize(
    ("fault", "quality", "why"),
    [
        ("dead", Quality.NO_ANSWER, "unit 2: nothing within 150 ms"),
        ("crc", Quality.GARBLED, "bytes are no answer"),
        ("half", Quality.GARBLED, "2 bytes are no answer: 02 83"),
        ("noise", Quality.GARBLED, "bytes are no answer"),
        ("refuse", Quality.REFUSED, "function 3 at address 0: exception 1 (illegal function)"),
        ("foreign", Quality.FOREIGN, "unit 3 answers for unit 2"),
    ],
)
def test_one_device_in_trouble(site: Site, fault: Any, quality: Quality, why: str) -> None:
    site.until(lambda: all_good(site), "all good")
    site.bus.slaves[2].fault = fault
    site.until(lambda: site.quality("hyd-2") is quality, f"{quality.name} said")
    before = {unit: site.amount(f"hyd-{unit}") for unit in (1, 2, 3)}
    site.until(lambda: min(site.amount(f"hyd-{unit}") - before[unit] for unit in (1, 3)) >= 3, "the others going on")
    assert site.amount("hyd-2") == before[2]  # nothing was made up
    assert site.quality("hyd-1") is site.quality("hyd-3") is Quality.GOOD
    said = [warning for warning in site.counters.warnings if f"hyd-2: {quality.name.lower()}" in warning]
    assert len(said) == 1
    assert why in said[0]
    assert "dropped_total{reason=missed_poll}" not in site.counters.values
    site.bus.slaves[2].fault = ""
    site.until(lambda: all_good(site), "good again")


def test_noise_before_an_answer_is_passed_over(site: Site) -> None:
    site.bus.slaves[1].fault = "preceded"
    site.until(lambda: all_good(site), "all good")
    assert not site.counters.warnings


def test_a_value_no_sensor_says_is_left_out(site: Site) -> None:
    site.bus.slaves[3].registers[0] = 9000  # kPa
    site.until(lambda: site.quality("hyd-3") is Quality.IMPLAUSIBLE, "said")
    assert any("pressure_mpa at address 0: raw value 9000" in warning for warning in site.counters.warnings)
    given = [one.values for _, one in site.given if one.device == "hyd-3" and "temperature_c" in one.values]
    assert given
    assert all("pressure_mpa" not in values and "battery_v" in values for values in given)


def test_an_adapter_that_is_pulled_out_and_put_back(site: Site) -> None:
    site.until(lambda: all_good(site), "all good")
    site.bus.unplug()
    site.until(lambda: site.quality("hyd-1") is Quality.UNPLUGGED, "said")
    assert all(site.quality(f"hyd-{unit}") is Quality.UNPLUGGED for unit in (2, 3))
    site.bus.plug()
    site.until(lambda: all_good(site), "good again")
    said = [warning for warning in site.counters.warnings if "unplugged" in warning]
    assert said == [f"bus-0: hyd-1, hyd-2, hyd-3: unplugged: {site.bus.wire.port} is gone"]
    assert "errors_total{stage=driver}" not in site.counters.values


def test_a_wrong_speed_gives_no_values_and_says_what_to_look_at(tmp_path: Path, sites: list[Site]) -> None:
    sites.append(site := Site(tmp_path, baud=9600))
    bad = (Quality.NO_ANSWER, Quality.GARBLED)
    site.until(lambda: all(site.quality(f"hyd-{unit}") in bad for unit in (1, 2, 3)), "all distrusted")
    assert not any("quality" not in one.values for _, one in site.given)
    assert any("are wiring, speed and parity right?" in warning for warning in site.counters.warnings)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_wrong_speed_makes_of_an_answer_is_no_answer(seed: int) -> None:
    block = Block(3, 0, 10, (Register("value", 0),))
    frame = bytes.fromhex("01 03 14") + random.Random(seed).randbytes(22)
    for baud in (4800, 19_200, 38_400):
        heard = understand(resampled(frame, 9600, baud), 1, block)
        assert not isinstance(heard.found, bytes)


def test_an_answer_is_found_whatever_is_around_it() -> None:
    """The frame is the example of the serial line specification's CRC: 02 07 → 41 12."""
    block = Block(3, 0, 1, (Register("value", 0),))
    answer = bytes.fromhex("11 03 02 00 2a f8 58")
    assert understand(answer, 0x11, block) == Heard(b"\x00\x2a", whole=True)
    assert understand(b"\x03\x03\xff" + answer + b"\x00", 0x11, block) == Heard(b"\x00\x2a", whole=True)
    for cut in range(1, len(answer)):
        assert not understand(answer[:cut], 0x11, block).whole
    for place in range(len(answer)):
        spoilt = answer[:place] + bytes([answer[place] ^ 1]) + answer[place + 1 :]
        assert not isinstance(understand(spoilt, 0x11, block).found, bytes)


def test_a_sample_on_request(tmp_path: Path, sites: list[Site]) -> None:
    sites.append(site := Site(tmp_path, text=CONFIG.replace("200ms", "1h")))
    site.until(lambda: site.amount("hyd-1") == 1, "the first")
    site.hosts.ask(Request("q1", "sample", "hyd-3"))
    site.until(lambda: site.amount("hyd-3") == 1, "the sample")
    site.bus.slaves[3].fault = "dead"
    site.hosts.ask(Request("q2", "sample", "hyd-3"))
    site.hosts.ask(Request("q3", "frame", "hyd-3"))
    answers: dict[str, tuple[bool, str]] = {}

    def answered() -> bool:
        answers.update({one.request: (one.ok, one.text) for one in site.hosts.answers()})
        return len(answers) == 3

    site.until(answered, "the answers")
    assert answers["q1"] == (True, "1 reads")
    assert answers["q2"][0] is False
    assert "hyd-3: unit 3: nothing within 150 ms" in answers["q2"][1]
    assert answers["q3"][0] is False


def test_events_are_told_when_they_change(tmp_path: Path, sites: list[Site]) -> None:
    own = CONFIG.replace("map: hydrant}}\n", "map: own}}\n", 1) + (
        "maps:\n  own:\n    registers:\n"
        "      - {{metric: fault_code, address: 20, lane: event}}\n"
        "      - {{metric: tilt_deg, address: 21, lane: event, deadband: 1}}\n"
        "      - {{metric: battery_v, address: 22, scale: 0.1}}\n"
        "      - {{metric: door_closed, table: discrete, address: 3, type: bit}}\n"
    )
    sites.append(site := Site(tmp_path, text=own))
    slave: Slave = site.bus.slaves[1]
    slave.registers.update({20: 0, 21: 5, 22: 36})
    slave.bits[3] = True
    site.until(lambda: site.amount("hyd-1") > 8, "readings")
    slave.registers.update({20: 41, 21: 6})
    site.until(lambda: any(one.values.get("fault_code") == 41 for _, one in site.given), "the event")
    events = [one.values for lane, one in site.given if lane is Lane.EVENT and one.device == "hyd-1"]
    assert events == [{"fault_code": 0, "tilt_deg": 5}, {"fault_code": 41}]
    assert {lane for lane, one in site.given if "door_closed" in one.values} == {Lane.TELEMETRY}


def test_an_adapter_that_hears_itself(tmp_path: Path, sites: list[Site]) -> None:
    sites.append(site := Site(tmp_path, echo=True))
    site.until(lambda: all_good(site), "all good")
    said = f"bus-0: echo: {site.bus.wire.port} gives back what it sends (a two-wire adapter with its receiver on)"
    assert site.counters.warnings == [said]
    assert site.counters.values["dropped_total{reason=echo}"] >= 3
    site.bus.slaves[2].fault = "dead"
    site.until(lambda: site.quality("hyd-2") is Quality.NO_ANSWER, "said")
    assert any("unit 2: nothing but the echo of our question within 150 ms" in one for one in site.counters.warnings)


def test_an_echo_that_looks_like_an_answer_is_none(tmp_path: Path) -> None:
    """A question about address 0x0300 to 0x03ff has the third byte, and so the length, of an answer of 3 bytes."""
    with asked(tmp_path, [Slave(1, {}, dict.fromkeys(range(0x300, 0x320), True))], 0.1, echo=True) as (_, line):
        assert line.ask(1, Block(1, 0x300, 20, ())) == b"\xff\xff\x0f"


def test_a_device_that_answers_late_is_waited_for_and_said(tmp_path: Path, sites: list[Site]) -> None:
    sites.append(site := Site(tmp_path))
    site.until(lambda: all_good(site), "all good")
    site.bus.slaves[2].late_s = 0.18
    site.until(lambda: site.counters.values["dropped_total{reason=late_answer}"] >= 1, "noticed")
    before = site.amount("hyd-2")
    site.until(lambda: site.amount("hyd-2") >= before + 3, "values again")
    assert "bus-0: late_answer: unit 2 answers later than 150 ms: raise `timeout`" in site.counters.warnings
    site.bus.slaves[2].late_s = 0.75
    site.until(lambda: site.quality("hyd-2") is Quality.NO_ANSWER, "too late", 20)
    site.until(lambda: "answers later than" in site.hosts.reasons().get("hyd-2", ""), "why", 20)
    before = site.amount("hyd-1")
    site.until(lambda: site.amount("hyd-1") >= before + 5, "the others going on")


# --- late answers ---

TIMEOUT_S = 0.02  # so long that a machine that is busy for a moment is not ten of them late


@contextmanager
def asked(
    folder: Path, slaves: list[Slave], timeout_s: float = TIMEOUT_S, *, echo: bool = False
) -> Iterator[tuple[RtuBus, SerialLine]]:
    """A bus and the line that asks it, without the schedule between them."""
    bus = RtuBus(folder / "ttyUSB0", slaves, echo=echo)
    bus.start()
    stations = tuple(Station(f"d{slave.unit_id}", slave.unit_id, "hydrant") for slave in slaves)
    line = SerialLine(Config(str(bus.wire.port), stations, 115_200, timeout=Duration(round(timeout_s * 1000))))
    line.open()
    try:
        yield bus, line
    finally:
        line.close()
        bus.stop()


class Counting(Slave):
    """A device whose every register tells its address and which question it answers: (address, number) in turn."""

    def __init__(self, unit_id: int, most: int, late: Callable[[], float]) -> None:
        super().__init__(unit_id, dict.fromkeys(range(most), 0))
        self.late = late

    def answer(self, request: Any) -> Any:
        self.late_s = self.late()
        number = len(self.asked)
        self.registers = {at: at if at % 2 == 0 else number for at in self.registers}
        return super().answer(request)


def longest_s(slave: Slave) -> float:
    """Return the longest that a device took for one of its last answers: this machine may make it later than it is."""
    pairs = list(zip(slave.asked, slave.told, strict=False))[-6:]
    begins = [asked_s if n == 0 else max(asked_s, pairs[n - 1][1]) for n, (asked_s, _) in enumerate(pairs)]
    return max((told_s - begin_s for (_, told_s), begin_s in zip(pairs, begins, strict=True)), default=0.0)


def answers_of(folder: Path, late: Callable[[], float], polls: int, most: int, seed: int) -> tuple[int, int, int]:
    """Ask a slow and a prompt device in turns; return how many answers the slow one gave, how many were late, and how
    many of the prompt one's failed. Whatever is taken for an answer must be the answer to the last question.
    """
    chosen = random.Random(seed)
    taken = noticed = failed = 0
    with asked(folder, [Counting(1, most, late), Counting(2, most, lambda: 0.0)]) as (bus, line):
        for _ in range(polls):
            unit_id, address = chosen.choice([(1, 0), (1, 10), (1, 20), (1, 24), (2, 0), (2, 10)])
            found = line.ask(unit_id, Block(3, address, most - 24 if address == 24 else 10, ()))
            noticed += sum(reason == "late_answer" for reason, _ in line.unused())
            if isinstance(found, bytes):
                told = struct.unpack_from(">HH", found)
                slave = bus.slaves[unit_id]
                assert told == (address, len(slave.asked)) or longest_s(slave) >= FORGET * TIMEOUT_S
            taken += isinstance(found, bytes) and unit_id == 1
            failed += isinstance(found, Trouble) and unit_id == 2
            if chosen.random() < 0.1:
                wait_s(chosen.uniform(0, 4 * TIMEOUT_S))
    return taken, noticed, failed


@pytest.mark.parametrize(("times", "most"), [(1.2, 30), (2.0, 64), (5.0, 30), (5.0, 64)])
def test_a_late_answer_is_never_taken_for_another(tmp_path: Path, times: float, most: int) -> None:
    """most: how many registers it has; with 30 it refuses a read that is widened at the end."""
    taken, noticed, _ = answers_of(tmp_path, lambda: times * TIMEOUT_S, 100, most, seed=round(times * 10))
    assert noticed >= 1
    assert taken >= 25 or times > 1.5


@pytest.mark.soak
@pytest.mark.parametrize("most", [30, 64], ids=["refuses more", "has more"])
@pytest.mark.parametrize("times", [1.2, 2.0, 5.0, 0.0])
def test_late_answers_over_2000_polls(tmp_path: Path, times: float, most: int) -> None:
    """times 0: now prompt, now as late as 5 time-outs."""
    chosen = random.Random(5)

    def late() -> float:
        return (times or chosen.choice([0, 0, 0, 1.1, 1.5, 3, 5])) * TIMEOUT_S

    _, noticed, _ = answers_of(tmp_path, late, 2000, most, seed=round(times * 10) + 1)
    assert noticed >= 1


WRONG = [
    ("unit_id: 2", "unit_id: 248", r"gateway.yaml:1.*devices\[1\] unit_id: expected 1 to 247, got 248"),
    ("unit_id: 2", "unit_id: 1", r"unit_id 1 stands there twice"),
    ("device: hyd-2", "device: hyd-1", r"device 'hyd-1' stands there twice"),
    ("unit_id: 2, map: hydrant", "unit_id: 2, map: hydrand", r"devices\[1\] map: 'hydrand' is none of hydrant, pump"),
    ("baud: 115200", "baud: 300", r"interval: reading all devices takes 2035% of what 300 baud allows"),
    ("timeout: 150ms", "timeout: 6s", r"timeout: expected up to 5s"),
    ("timeout: 150ms", "timeot: 150ms", r"gateway.yaml:4 timeot: unknown field 'timeot'; did you mean 'timeout'"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), WRONG)
def test_a_wrong_configuration_is_refused(right: str, wrong: str, message: str) -> None:
    text = CONFIG.format(port="/dev/ttyUSB0").replace(right, wrong)
    with pytest.raises(ConfigError, match=message):
        configured(text)


WRONG_REGISTERS = [
    ("address: 65536", "address: expected 0 to 65535, got 65536"),
    ("address: 65535, type: float32", "address: expected 0 to 65534"),
    ("address: 1, metric: presure", "unknown metric 'presure'"),
    ("address: 1, unit: V", r"unit: pressure_mpa is in MPa \(also known: bar, kPa, psi\), got 'V'"),
    ("address: 1, type: int64", "Invalid enum value 'int64'"),
    ("address: 1, table: coil", "type: a coil is a bit, got uint16"),
    ("address: 1, scale: 0", "scale: expected a number other than 0"),
    ("address: 1, bit: 3", "bit: expected 0 to 15, of a register with type bit"),
    ("address: 1, low: 2, high: 1", "low: expected at most high"),
    ("address: 1, deadband: 1", "deadband: expected 0 or more, for lane event"),
]


@pytest.mark.parametrize(("register", "message"), WRONG_REGISTERS)
def test_a_wrong_register_is_refused_with_its_line(register: str, message: str) -> None:
    fields = register if "metric" in register else f"metric: pressure_mpa, {register}"
    text = CONFIG.format(port="/dev/ttyUSB0") + f"maps:\n  own:\n    registers:\n      - {{{fields}}}\n"
    with pytest.raises(ConfigError, match=rf"gateway.yaml:12 maps\.own\.registers\[0\]\S*: {message}"):
        configured(text)


def test_the_load_of_a_line() -> None:
    config = configured(CONFIG.format(port="/dev/ttyUSB0"))
    block = Block(3, 0, 10, ())
    assert config.wire_s(block) == pytest.approx(33 * 10 / 115_200 + 2 * 0.00175)
    assert config.load() == pytest.approx(3 * config.wire_s(block) / 0.2)
    assert config.interval == Duration(200)
