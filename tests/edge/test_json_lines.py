"""JSON lines over sockets and a pseudo-terminal: what is no reading is counted with a sample, the rest is taken."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.clock import monotonic_s, system_clock
from citybrain.config import convert, parse_yaml
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.drivers.json_lines import MOST_LINE_BYTES, Config, Splitter
from edge.host import Configured, Hosts
from simulators.lines.wire import Wire
from tests.conftest import eventually, unused_port

COMMON = """\
devices: {probe: hyd-1, gate: lift-1}
metrics:
  p: {metric: pressure_mpa, unit: kPa}
  code: {metric: fault_code, lane: event}
"""


def configured(text: str) -> Config:
    value, lines = parse_yaml(text, "gateway.yaml")
    return convert(value, Config, lines)


class Site:
    """The driver under its supervisor, and what it gave."""

    def __init__(self, text: str) -> None:
        self.counters = Counters("gateway")
        self.hosts = Hosts([Configured("kit", "json_lines", configured(text))], self.counters, system_clock())
        self.hosts.start()
        self.given: list[tuple[Lane, Reading]] = []

    def poll(self) -> None:
        self.given += self.hosts.poll(system_clock().now_ms())

    def until(self, holds: Callable[[], object], what: str = "the condition") -> None:
        def looked() -> object:
            self.poll()
            return holds()

        eventually(looked, what=what)

    @property
    def readings(self) -> list[tuple[Lane, Reading]]:
        return [(lane, one) for lane, one in self.given if "quality" not in one.values]

    def dropped(self, reason: str) -> int:
        return self.counters.values[f"dropped_total{{reason={reason}}}"]


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.hosts.stop(0)


def connected(port: int) -> socket.socket:
    found: list[socket.socket] = []

    def reached() -> bool:
        try:
            found.append(socket.create_connection(("127.0.0.1", port), 1.0))
        except OSError:
            return False
        return True

    eventually(reached, what="the driver listening")
    return found[0]


def test_lines_become_readings_and_rubbish_is_counted_with_a_sample(sites: list[Site], free_port: int) -> None:
    sites.append(site := Site(f"listen: {free_port}\n{COMMON}"))
    with connected(free_port) as client:
        client.sendall(
            b'{"d":"probe","t":1767225600123,"m":{"p":310,"battery_v":3.6}}\r\n'
            b"\x00\xffrubbish\n"
            b'{"d":"probe","m":{"p":"high"}}\n'
            b'{"d":"probe","m":{"p":1e999}}\n'
            b'{"d":"nobody","m":{"p":1}}\n'
            b'{"d":"probe","m":{"p":320,"colour":4},"extra":[1]}\n'
            b'{"d":"probe","m":{"p":9000}}\n'
            b"\n" + b"x" * (MOST_LINE_BYTES + 1) + b"\n"
            b'{"d":"gate","t":7,"m":{"code":41}}\n{"d":"probe"'
        )
        before_ms = system_clock().now_ms()
        site.until(lambda: any(lane is Lane.EVENT for lane, _ in site.readings), "the event")
    site.until(lambda: site.dropped("half_line"), "the half line")
    first, second, event = [one for _, one in sorted(site.readings, key=lambda given: given[0])]
    assert first == Reading("hyd-1", 1767225600123, {"pressure_mpa": 0.31, "battery_v": 3.6})
    assert second.values == {"pressure_mpa": 0.32}
    assert abs(second.observed_at - before_ms) < 5000
    assert event == Reading("lift-1", 7, {"fault_code": 41})
    counted = {"no_json_line": 3, "unknown_device": 1, "unknown_metric": 1, "line_too_long": 1, "half_line": 1}
    assert {reason: site.dropped(reason) for reason in counted} == counted
    told = "\n".join(site.counters.warnings)
    assert r"\xffrubbish" in told
    assert 'unknown_device: {"d":"nobody"' in told
    assert "hyd-1: 'colour'" in told
    assert "hyd-1: implausible: p: 9000" in told
    assert 'half_line: {"d":"probe"' in told


def test_a_flood_of_rubbish_is_counted_and_shown_once(sites: list[Site], free_port: int) -> None:
    sites.append(site := Site(f"listen: {free_port}\n{COMMON}"))
    with connected(free_port) as client:
        client.sendall(b"".join(b"rubbish %d\n" % number for number in range(2000)))
        site.until(lambda: site.dropped("no_json_line") == 2000, "all counted")
    assert [one for one in site.counters.warnings if "rubbish" in one] == [
        "kit: no_json_line: JSON is malformed: invalid character (byte 0): rubbish 0"
    ]


def test_who_goes_away_is_unplugged_and_good_again_when_back(sites: list[Site], free_port: int) -> None:
    sites.append(site := Site(f"listen: {free_port}\n{COMMON}"))
    for _ in range(2):
        with connected(free_port) as client:
            client.sendall(b'{"d":"probe","m":{"p":1}}\n')
            site.until(lambda: site.hosts.qualities().get("hyd-1") is Quality.GOOD, "good")
        site.until(lambda: site.hosts.qualities().get("hyd-1") is Quality.UNPLUGGED, "unplugged")


def test_a_line_over_a_serial_port_that_is_pulled_out(sites: list[Site], tmp_path: Path) -> None:
    wire = Wire(tmp_path / "ttyACM0", 115_200)
    wire.plug()
    sites.append(site := Site(f"port: {wire.port}\n{COMMON}"))
    eventually(lambda: wire.far_baud == 115_200 and site.hosts._drivers["kit"].run is not None)

    def heard() -> bool:
        wire.write(b'{"d":"probe","m":{"p":310}}\n{"d":', monotonic_s())
        return site.hosts.qualities().get("hyd-1") is Quality.GOOD

    site.until(heard, "a reading")
    wire.unplug()
    site.until(lambda: site.hosts.qualities().get("hyd-1") is Quality.UNPLUGGED, "unplugged")
    wire.plug()
    site.until(heard, "good again")
    wire.unplug()


def test_a_wrong_speed_is_said_soon_and_shown_on_one_line(sites: list[Site], tmp_path: Path) -> None:
    wire = Wire(tmp_path / "ttyACM0", 9600)
    wire.plug()
    try:
        sites.append(site := Site(f"port: {wire.port}\nbaud: 19200\n{COMMON}silence: 1h\n"))

        def garbled() -> bool:
            wire.write(b"\x1b[2J\x0b{}\n" + b'{"d":"probe","m":{"p":310}}\n' * 3, monotonic_s())
            return site.hosts.qualities().get("hyd-1") is Quality.GARBLED

        site.until(garbled, "garbled said")
        assert site.hosts.reasons()["hyd-1"] == "garbled: no JSON lines; is 19200 baud right?"
        wire.baud = 19200
        site.until(lambda: not garbled() and site.readings, "good again")
    finally:
        wire.unplug()


def test_a_port_that_somebody_listens_on_is_named(sites: list[Site], free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        sites.append(site := Site(f"listen: {free_port}\n{COMMON}"))
        said = f"unplugged: port {free_port} is used by another program"
        site.until(lambda: site.hosts.reasons().get("hyd-1") == said, "the port's other user said")
    with connected(free_port) as client:
        client.sendall(b'{"d":"probe","m":{"p":310}}\n')
        site.until(lambda: site.readings, "it is taken once it is free")


def test_connecting_out_again_and_again(sites: list[Site]) -> None:
    port = unused_port()
    sites.append(site := Site(f"connect: 127.0.0.1:{port}\n{COMMON}"))
    site.until(lambda: site.hosts.qualities().get("hyd-1") is Quality.UNPLUGGED, "unplugged")
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(10)
        client, _ = server.accept()
        with client:
            client.sendall(b'{"d":"probe","m":{"p":310}}\n')
            site.until(lambda: site.readings, "a reading")
    assert sum("unplugged" in warning for warning in site.counters.warnings) >= 1
    assert "errors_total{stage=driver}" not in site.counters.values


def test_a_silent_device_does_not_answer_and_nobody_can_ask_it(sites: list[Site], free_port: int) -> None:
    sites.append(site := Site(f"listen: {free_port}\n{COMMON}silence: 300ms\n"))
    with connected(free_port) as client:
        client.sendall(b'{"d":"probe","m":{"p":310}}\n')
        site.until(lambda: site.hosts.qualities().get("lift-1") is Quality.NO_ANSWER, "silence said")
        site.hosts.ask(Request("r", "sample", "hyd-1"))
        answers: list[bool] = []

        def answered() -> bool:
            answers.extend(one.ok for one in site.hosts.answers())
            return bool(answers)

        site.until(answered, "the answer")
    assert answers == [False]


@given(st.lists(st.binary(max_size=40).filter(lambda one: b"\n" not in one)), st.lists(st.integers(1, 9), min_size=1))
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], steps: list[int]) -> None:
    whole = b"".join(line + b"\n" for line in lines) + b"rest"
    splitter, found, at, turn = Splitter(), [], 0, 0
    while at < len(whole):
        step = steps[turn % len(steps)]
        some, long = splitter.feed(whole[at : at + step])
        found += some
        assert long == 0
        at, turn = at + step, turn + 1
    assert found == lines
    assert splitter.end() == b"rest"


@pytest.mark.parametrize("step", [1, 7, 4096, 100_000])
def test_a_line_that_is_too_long_costs_only_itself(step: int) -> None:
    whole = b"a\n" + b"x" * (3 * MOST_LINE_BYTES) + b"\nb\n"
    splitter, found, too_long = Splitter(), [], 0
    for at in range(0, len(whole), step):
        some, long = splitter.feed(whole[at : at + step])
        found += some
        too_long += long
    assert (found, too_long) == ([b"a", b"b"], 1)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("listen: 7070", "", "expected one of `listen`, `connect` and `port`"),
        ("listen: 7070", "listen: 7070\nport: /dev/ttyS0", "expected one of `listen`, `connect` and `port`"),
        ("listen: 7070", "listen: 0", "listen: expected 1 to 65535, got 0"),
        ("listen: 7070", "connect: here", "connect: expected host:port"),
        ("unit: kPa", "unit: V", r"gateway\.yaml:4 metrics\.p: unit: pressure_mpa is in MPa, got 'V'"),
        ("metric: fault_code", "metric: fault", r"gateway\.yaml:5 metrics\.code: unknown metric 'fault'"),
        ("gate: lift-1", "gate: hyd-1", "devices: expected at least one, each of ours once"),
        ("unit: kPa", "unt: kPa", r"gateway\.yaml:4 metrics\.p\.unt: unknown field 'unt'; did you mean 'unit'"),
    ],
)
def test_a_wrong_configuration_is_refused(right: str, wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(("listen: 7070\n" + COMMON).replace(right, wrong))
