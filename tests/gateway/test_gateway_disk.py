"""The gateway on a disk that is really full, or read-only: a small one, mounted in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from citybrain.model import Lane
from tests.conftest import end, eventually
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, config_text

RUN = 'exec "$3" -P -m citybrain gateway run --data "$1"'
MOUNT = 'mount -t tmpfs -o size=3m tmpfs "$1" && cp "$2" "$1/gateway.yaml" && '


@contextmanager
def disk(tmp_path: Path, port: int, then: str = "") -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a gateway on a disk of 3 MiB; give its process, and what it wrote to stderr."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("this machine lets nobody mount a disk of his own")
        pytest.skip("this machine lets nobody mount a disk of his own")
    (tmp_path / "gateway.yaml").write_text(config_text(port))
    (tmp_path / "disk").mkdir()
    words = [unshare, "-Urm", "sh", "-c", MOUNT + then + RUN, "sh"]
    words += [str(tmp_path / "disk"), str(tmp_path / "gateway.yaml"), sys.executable]
    log = tmp_path / "box.log"
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        yield process, log
    finally:
        end(process)


def test_a_full_disk_is_said_and_the_gateway_goes_on_when_there_is_room(tmp_path: Path, mosquitto: int) -> None:
    platform = Answering(mosquitto)
    with disk(tmp_path, mosquitto) as (process, log):
        inside = Path(f"/proc/{process.pid}/root") / str(tmp_path / "disk").lstrip("/")
        eventually(lambda: platform.logged(GATEWAY, Lane.TELEMETRY), 20, "its own readings")
        fill(inside / "ballast")
        eventually(lambda: b"no space left" in log.read_bytes(), 25, "the full disk being said")
        assert process.poll() is None
        (inside / "ballast").unlink()
        before = len(platform.logged(GATEWAY, Lane.TELEMETRY))
        eventually(lambda: len(platform.logged(GATEWAY, Lane.TELEMETRY)) > before, 25, "readings again")
        process.terminate()
        assert process.wait(10) == 0
    platform.close()


def fill(path: Path) -> None:
    """Take what room there is."""
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


def test_a_read_only_disk_ends_it_with_code_5_and_the_reason(tmp_path: Path, mosquitto: int) -> None:
    with disk(tmp_path, mosquitto, 'mount -o remount,ro "$1" && ') as (process, log):
        assert process.wait(20) == 5
        assert "Read-only file system" in log.read_text()
