"""`citybrain gateway run`: the process, its configuration, its own readings, its clock, and what systemd is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from citybrain.model import Lane
from tests.conftest import eventually
from tests.gateway_box import GATEWAY, Process, config_text
from tests.test_gateway_service import Answering


@pytest.fixture
def platform(mosquitto: int) -> Iterator[Answering]:
    answering = Answering(mosquitto)
    yield answering
    answering.close()


@pytest.fixture
def folder(tmp_path: Path, mosquitto: int) -> Path:
    made = tmp_path / "box"
    made.mkdir()
    (made / "gateway.yaml").write_text(config_text(mosquitto))
    return made


def notifications(address: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(address))
    sock.settimeout(10)
    return sock


def test_it_says_ready_tells_its_vitals_lives_and_ends_cleanly(
    tmp_path: Path, folder: Path, platform: Answering
) -> None:
    with notifications(tmp_path / "notify") as systemd:
        box = Process(folder, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="600000")
        try:
            told = [systemd.recv(1000).decode()]
            while "WATCHDOG=1" not in told or not any("online" in text and "offline" not in text for text in told):
                told.append(systemd.recv(1000).decode())
            assert "READY=1" in told[:2]
            eventually(lambda: platform.logged(GATEWAY, Lane.TELEMETRY), what="its own readings")
        finally:
            code = box.stop()
        assert code == 0
        while "STOPPING=1" not in told:
            told.append(systemd.recv(1000).decode())
    assert [status.online for name, status in platform.statuses if name == GATEWAY] == [True, False]
