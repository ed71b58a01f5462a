"""The real `citybrain cloud` between a real client, a real broker and real ingest, also when it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud_site import CloudSite, imei, message
from tests.conftest import eventually


@pytest.fixture
def site(tmp_path: Path) -> Iterator[CloudSite]:
    """A broker, ingest with the registry in force, and the intake."""
    made = CloudSite(tmp_path)
    try:
        made.start_broker()
        made.provision()
        made.start("ingest")
        eventually(lambda: made.layout.read_active() is not None, 60, "the registry in force")
        made.start("cloud")
        yield made
    finally:
        made.stop()


def test_what_is_pushed_is_in_the_log_once(site: CloudSite) -> None:
    client, now_ms = site.client(), site.run.clock.now_ms()
    batch = [message(imei(0), now_ms - 1000, water_pressure=310, battery={"voltage": 3.6}, tilt=1.5)]
    status, body, _ = client.post(batch)
    assert (status, body["accepted"], body["repeated"]) == (200, 1, 0)
    for _ in range(3):
        assert client.post(batch)[1]["repeated"] == 1
    eventually(lambda: len(site.logged()) == 3, what="three values in the log")
    at_ms = now_ms - 1000
    wanted = {
        (imei(0), "pressure_mpa", at_ms, 0.31),
        (imei(0), "battery_v", at_ms, 3.6),
        (imei(0), "tilt_deg", at_ms, 1.5),
    }
    eventually(site.drained, what="everything acknowledged")
    assert site.logged() == dict.fromkeys(wanted, 1)
    client.close()

