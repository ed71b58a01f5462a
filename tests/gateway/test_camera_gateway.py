"""A camera, the real gateway process and a real broker: an event and its evidence reach the platform."""

from __future__ import annotations

from pathlib import Path

from citybrain.model import Lane
from simulators.lines.video import Planted
from tests.conftest import eventually
from tests.edge.test_camera_driver import clip
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, Process, config_text

DRIVERS = """\
drivers:
  cam:
    driver: camera
    device: cam-1
    source: {source}
    repeat: true
    regions:
      bins: {{sees: garbage, polygon: [[0.08, 0.55], [0.4, 0.55], [0.4, 0.95], [0.08, 0.95]], dwell: 4s}}
"""


def test_an_event_and_its_evidence_reach_the_platform(tmp_path: Path, mosquitto: int) -> None:
    source = clip(tmp_path / "street.avi", 16.0, Planted("garbage", 6.0))
    platform = Answering(mosquitto)
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "gateway.yaml").write_text(config_text(mosquitto, DRIVERS.format(source=source)))
    box = Process(folder)
    try:
        eventually(lambda: platform.logged(GATEWAY, Lane.BLOB), 40, "the evidence")
        eventually(lambda: platform.logged(GATEWAY, Lane.EVENT), 10, "the event")
        eventually(lambda: platform.logged(GATEWAY, Lane.TELEMETRY), 10, "the health")
    finally:
        code = box.stop()
        platform.close()
    assert code == 0, box.said()
    seen = {reading.device: reading.values for reading in platform.readings if "evidence" in reading.values}
    assert seen["cam-1"]["garbage_s"] >= 4.0
