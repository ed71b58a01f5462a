"""An RTSP camera for tests that can be killed, hung and started again on its port.

Where Debian's gst-rtsp-server is missing its tests are skipped and say why, but with CI=true they fail.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

SERVER = Path(__file__).parents[1] / "simulators" / "lines" / "rtsp_server.py"
PYTHON = "/usr/bin/python3"  # Debian's own: PyGObject is there and nowhere else
PACKAGES = "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base -good -ugly"
PROBE = """
import gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
missing = [name for name in ("avidemux", "jpegdec", "x264enc", "rtph264pay") if not Gst.ElementFactory.find(name)]
raise SystemExit(f"GStreamer has no {', '.join(missing)}" if missing else 0)
"""


def needed() -> None:
    """Skip, or fail where this is CI, when there can be no RTSP server."""
    if not Path(PYTHON).exists():
        _impossible(f"{PYTHON} is not there")
    done = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        _impossible(done.stderr.strip().rpartition("\n")[2])


def _impossible(why: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"an RTSP server is needed: {why}")
    pytest.skip(f"no RTSP server: {why} (apt-get install {PACKAGES})")


class RtspCamera:
    """One camera that plays a clip (AVI, MJPEG)."""

    def __init__(self, clip: Path, credentials: str = "") -> None:
        self._clip = clip
        self._credentials = credentials
        self._process: subprocess.Popen[str] | None = None
        self.port = "0"

    @property
    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/stream"

    def start(self) -> None:
        """Start it, on the port it had."""
        argv = [PYTHON, str(SERVER), str(self._clip), self.port, self._credentials]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = self._process.stdout.readline().strip()
        assert self.port.isdecimal(), "the RTSP server said no port"

    def kill(self) -> None:
        """Pull its plug."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def hang(self) -> None:
        """Let it say nothing any more, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
