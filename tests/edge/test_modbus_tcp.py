"""Modbus/TCP on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from citybrain.clock import system_clock
from citybrain.config import convert, parse_yaml
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from edge.driver import Quality
from edge.drivers.modbus_tcp import Config
from edge.host import Configured, Hosts
from simulators.lines.modbus import Slave, TcpServer, hydrant
from tests.conftest import eventually

CONFIG = """\
address: 127.0.0.1
port: {port}
interval: 100ms
timeout: 300ms
devices:
  - {{device: pump-1, unit_id: 1, map: pump_room}}
  - {{device: hyd-2, unit_id: 2, map: hydrant}}
"""


def pump_room() -> Slave:
    """Return a pump room's controller after the map `pump_room`: 0.5 MPa, 36 m3/h, 12.3 A, running."""
    registers = [0x3F00, 0, 0x4210, 0, 123, 3800, 60, 3, 215, 0]
    return Slave(1, dict(enumerate(registers)), {0: True})


class Site:
    """A server with a pump room and a hydrant, and the driver on it."""

    def __init__(self, port: int = 0, *, echo: bool = False) -> None:
        self.server = TcpServer([pump_room(), hydrant(2)], echo=echo)
        self.server.start()
        value, lines = parse_yaml(CONFIG.format(port=port or self.server.port), "gateway.yaml")
        self.counters = Counters("gateway")
        driver = Configured("tcp", "modbus_tcp", convert(value, Config, lines))
        self.hosts = Hosts([driver], self.counters, system_clock())
        self.hosts.start()
        self.given: list[tuple[Lane, Reading]] = []

    def until(self, holds: Callable[[], object], what: str) -> None:
        def looked() -> object:
            self.given += self.hosts.poll(system_clock().now_ms())
            return holds()

        eventually(looked, what=what)

    def good(self) -> bool:
        return self.hosts.qualities() == {"pump-1": Quality.GOOD, "hyd-2": Quality.GOOD}

    def amount(self, device: str) -> int:
        return sum(one.device == device and "pressure_mpa" in one.values for _, one in self.given)


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.hosts.stop(0)
        site.server.stop()


def test_a_pump_room_in_its_units(sites: list[Site]) -> None:
    sites.append(site := Site())
    site.until(site.good, "both good")
    values = next(one.values for lane, one in site.given if "moving" in one.values)
    assert values == pytest.approx(
        {
            "pressure_mpa": 0.5, "flow_lps": 10.0, "current_a": 12.3, "voltage_v": 380.0, "vibration_rms_g": 0.06,
            "level_m": 0.03, "temperature_c": 21.5, "moving": 1,
        }
    )  # fmt: skip
    assert [one.values for lane, one in site.given if lane is Lane.EVENT and one.device == "pump-1"] == [
        {"fault_code": 0}
    ]


@pytest.mark.parametrize(
    ("fault", "quality", "why"),
    [
        ("dead", Quality.NO_ANSWER, "unit 2: nothing within 300 ms"),
        ("refuse", Quality.REFUSED, "function 3 at address 0: exception 1 (illegal function)"),
        ("foreign", Quality.FOREIGN, "unit 3 answers for unit 2"),
    ],
)
def test_one_unit_in_trouble(sites: list[Site], fault: Any, quality: Quality, why: str) -> None:
    sites.append(site := Site())
    site.until(site.good, "both good")
    site.server.slaves[2].fault = fault
    site.until(lambda: site.hosts.qualities()["hyd-2"] is quality, "said")
    assert any(f"tcp: hyd-2: {quality.name.lower()}: {why}" in warning for warning in site.counters.warnings)
    before = site.amount("pump-1"), site.amount("hyd-2")
    site.until(lambda: site.amount("pump-1") >= before[0] + 5, "the other going on")
    assert site.amount("hyd-2") == before[1]
    site.server.slaves[2].fault = ""
    site.until(site.good, "good again")


def test_a_register_that_is_not_there_costs_only_its_block(sites: list[Site]) -> None:
    sites.append(site := Site())
    site.server.slaves[1].bits.clear()
    site.until(lambda: site.hosts.qualities().get("pump-1") is Quality.REFUSED, "said")
    assert any("function 2 at address 0: exception 2 (illegal data address)" in one for one in site.counters.warnings)
    assert any("pressure_mpa" in one.values for _, one in site.given if one.device == "pump-1")


def test_a_connection_that_is_cut_is_made_again(sites: list[Site]) -> None:
    sites.append(site := Site())
    site.until(site.good, "both good")
    site.server.cut()
    site.until(lambda: site.hosts.qualities()["pump-1"] is Quality.UNPLUGGED, "unplugged")
    site.until(site.good, "good again")


def test_a_late_answer_is_told_from_the_next_by_its_number(sites: list[Site]) -> None:
    sites.append(site := Site())
    site.until(site.good, "both good")
    site.server.slaves[2].late_s = 0.4
    site.until(lambda: site.counters.values["dropped_total{reason=late_answer}"] >= 2, "late answers")
    site.until(lambda: site.hosts.qualities()["hyd-2"] is Quality.NO_ANSWER, "said")
    assert "tcp: late_answer: 127.0.0.1 answers later than 300 ms: raise `timeout`" in site.counters.warnings
    known = {round(one.values["pressure_mpa"], 3) for _, one in site.given if "pressure_mpa" in one.values}
    assert known == {0.5, 0.312}
    site.server.slaves[2].late_s = 0.0
    site.until(site.good, "good again")


def test_a_converter_that_gives_back_what_it_is_asked(sites: list[Site]) -> None:
    sites.append(site := Site(echo=True))
    site.until(site.good, "both good")
    assert "tcp: echo: 127.0.0.1 gives back what it is asked" in site.counters.warnings
    assert site.counters.values["dropped_total{reason=echo}"] >= 2
    site.server.slaves[2].fault = "dead"
    site.until(lambda: site.hosts.qualities()["hyd-2"] is Quality.NO_ANSWER, "said")
    assert "unit 2: nothing but our own question within 300 ms" in site.hosts.reasons()["hyd-2"]


def test_nobody_there(sites: list[Site], free_port: int) -> None:
    sites.append(site := Site(free_port))
    site.until(lambda: site.hosts.qualities().get("pump-1") is Quality.UNPLUGGED, "unplugged")
    assert site.counters.warnings == [f"tcp: pump-1, hyd-2: unplugged: 127.0.0.1:{free_port}: Connection refused"]


def test_a_server_that_speaks_something_else(sites: list[Site]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    client.recv(100)

        threading.Thread(target=greet, daemon=True).start()
        sites.append(site := Site(int(server.getsockname()[1])))
        site.until(lambda: site.hosts.qualities().get("pump-1") is Quality.UNPLUGGED, "said")
        assert any("does not speak Modbus: 53 53 48" in warning for warning in site.counters.warnings)


def test_a_wrong_port_is_refused() -> None:
    value, lines = parse_yaml(CONFIG.format(port=70000), "gateway.yaml")
    with pytest.raises(ConfigError, match=r"gateway.yaml:1: port: expected 1 to 65535, got 70000"):
        convert(value, Config, lines)
