"""A bus, the real gateway process and a real broker: what a device says reaches the platform, at its own pace."""

from __future__ import annotations

from pathlib import Path

from citybrain.model import Lane
from simulators.lines.modbus import RtuBus, hydrant
from tests.conftest import eventually
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, Process, config_text

DRIVERS = """\
drivers:
  bus-0:
    driver: modbus_rtu
    port: {port}
    baud: 115200
    interval: 200ms
    limits: [{{metric: pressure_mpa, below: 0.14, code: 3}}]
    devices:
      - {{device: hyd-1, unit_id: 1, map: hydrant}}
      - {{device: hyd-2, unit_id: 2, map: hydrant}}
"""


def test_a_limit_that_is_passed_on_the_line_becomes_an_event_at_the_platform(tmp_path: Path, mosquitto: int) -> None:
    bus = RtuBus(tmp_path / "ttyUSB0", [hydrant(1), hydrant(2)])
    bus.start()
    platform = Answering(mosquitto)
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "gateway.yaml").write_text(config_text(mosquitto, DRIVERS.format(port=bus.wire.port)))
    box = Process(folder)
    try:
        eventually(lambda: platform.logged(GATEWAY, Lane.EVENT), 20, "the first judgement")
        before = len(platform.logged(GATEWAY, Lane.EVENT))
        bus.slaves[2].registers[0] = 90  # kPa
        eventually(lambda: len(platform.logged(GATEWAY, Lane.EVENT)) > before, 10, "the local alarm")
        beat = box.beat()
        assert beat is not None
        assert beat.gauges["wrong"] == 0.0
    finally:
        code = box.stop()
        platform.close()
        bus.stop()
    assert code == 0, box.said()
