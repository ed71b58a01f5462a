"""What tests of several parts share: free loopback ports, a real broker, and waiting for a condition by polling."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.supervisor import accepts

# Their broker and their server are one for all files of a session.
pytest_plugins = ("tests.kafka_cluster", "tests.postgres")


def unused_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], object], within_s: float = 10.0, what: str = "the condition") -> None:
    """Poll until `holds()` is true; fail after `within_s`."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {within_s:g} s")
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop one process, by its id, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


@pytest.fixture
def free_port() -> int:
    """A loopback port that nobody listens on."""
    return unused_port()


@pytest.fixture
def mosquitto(tmp_path: Path, free_port: int) -> Iterator[int]:
    """A real broker, configured as in production; the value is its port."""
    program = find_mosquitto()
    assert program is not None, "mosquitto is not installed: apt-get install mosquitto (or run .ci/run)"
    path = tmp_path / "mosquitto.conf"
    path.write_text(mosquitto_configuration(free_port))
    log = (tmp_path / "mosquitto.log").open("wb")
    with log, subprocess.Popen([program, "-c", str(path)], stdout=log, stderr=log) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", free_port), what="mosquitto listening")
            yield free_port
        finally:
            end(process)
