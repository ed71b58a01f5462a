"""The whole box with lifts and fast sensors on its lines, up to the platform's end of a real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from citybrain.model import Lane
from simulators.lines.accelerometer import SAMPLES, Accelerometer, sines
from simulators.lines.elevator import Line
from simulators.lines.pressure import SAMPLES as PRESSURES
from simulators.lines.pressure import Transmitter
from simulators.lines.retrofit import LANDINGS, RATE_HZ, Journey, endless, told
from simulators.lines.talker import Talker
from tests.conftest import eventually
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, Process, config_text

DRIVERS = """\
drivers:
  lifts: {{driver: elevator_serial, port: {0}/lifts, region: regional_11, devices: [{{device: lift-1, station: 1}}]}}
  kit:
    driver: elevator_retrofit
    port: {0}/kit
    devices: [{{device: lift-2, station: 1, floors: {{-1: 0, 1: 4.2, 2: 7.4, 3: 10.6}}}}]
  bearing:
    driver: vibration
    port: {0}/bearing
    rate_hz: 500
    full_scale_g: 4
    window: 1s
    devices: [{{device: pump-1, station: 1, bands_hz: [[2, 40], [40, 100]]}}]
  mains:
    driver: pressure_fast
    port: {0}/mains
    rate_hz: 100
    interval: 1s
    devices: [{{device: hyd-1, station: 1}}]
"""


@pytest.fixture
def platform(mosquitto: int) -> Iterator[Answering]:
    answering = Answering(mosquitto)
    yield answering
    answering.close()


def test_four_lines_behind_one_box(tmp_path: Path, mosquitto: int, platform: Answering) -> None:
    lifts = Line(tmp_path / "lifts", "regional_11")
    ticks = (told(1, tick) for tick in endless(Journey(LANDINGS, 1)))
    sensor, transmitter = Accelerometer(1, 500.0, 4.0, sines(0.2, 50.0)), Transmitter(1, 100.0)
    talkers = [
        lifts.talker,
        Talker(tmp_path / "kit", 115_200, lambda _: [*next(ticks), *next(ticks)], 2 / RATE_HZ),
        Talker(tmp_path / "bearing", 115_200, lambda _: [sensor.frame()], SAMPLES / 500),
        Talker(tmp_path / "mains", 115_200, lambda _: [transmitter.frame()], PRESSURES / 100),
    ]
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "gateway.yaml").write_text(config_text(mosquitto, DRIVERS.format(tmp_path)))
    for talker in talkers:
        talker.start()
    box = Process(folder)

    def values(device: str, metric: str) -> list[float]:
        return [one.values[metric] for one in platform.readings if one.device == device and metric in one.values]

    try:
        box.wait_online()
        eventually(lambda: values("lift-1", "fault_code") == [0.0], 20, "the controller")
        eventually(lambda: values("lift-2", "moving"), 20, "the kit")
        eventually(lambda: values("pump-1", "vibration_band_2_g"), 20, "the accelerometer")
        eventually(lambda: values("hyd-1", "pressure_max_mpa"), 20, "the transmitter")
        lifts.set(1, occupied=True, door_zone=False)
        transmitter.slam(0.5)
        lifts.say(1, "alarm", 11)
        eventually(lambda: 93.0 in values("lift-1", "fault_code"), 20, "the trapped passenger")
        eventually(lambda: max(values("hyd-1", "hammer_mpa"), default=0) > 0.4, 20, "the stroke")
        assert platform.logged(GATEWAY, Lane.EVENT)
        for device in ("lift-1", "lift-2", "pump-1", "hyd-1"):
            eventually(lambda device=device: values(device, "quality")[-1:] == [0.0], 20, device)  # type: ignore[misc]
    finally:
        code = box.stop()
        for talker in talkers:
            talker.stop()
    assert code == 0
