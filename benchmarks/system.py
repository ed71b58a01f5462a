"""The product as its user runs it, for benchmarks: `citybrain run --simulate` in a process group of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from citybrain.counters import read_heartbeats
from citybrain.layout import Layout


class System:
    """A running system in the data folder `root`; `start` waits until it is live."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.layout = Layout(root)
        self._arguments = ["run", "--simulate", "--data", str(root), *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; return the seconds until `citybrain status` said that it is live."""
        argv = [sys.executable, "-m", "citybrain", *self._arguments]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
        return self.wait_for(self._is_live, 120, "live")

    def _is_live(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise SystemExit(f"`citybrain {' '.join(self._arguments)}` ended with {self.process.returncode}")
        return self.status() is not None

    def status(self) -> dict[str, Any] | None:
        """Return what `citybrain status --json` says, None where the system is not live."""
        argv = [sys.executable, "-m", "citybrain", "status", "--json", "--data", str(self.layout.root)]
        done = subprocess.run(argv, capture_output=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def wait_for(self, condition: Callable[[], bool], limit_s: float, what: str) -> float:
        """Wait until the condition holds; return how long it took, or end the benchmark."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > limit_s:
                raise SystemExit(f"not {what} within {limit_s} s")
            time.sleep(0.05)
        return time.monotonic() - start

    def children(self) -> dict[str, int]:
        """Return the process ids of its parts now, as the supervisor tells them."""
        beats = [beat for beat in read_heartbeats(self.layout.run) if beat.process == "run"]
        return dict(beats[0].details.get("children", {})) if beats else {}

    def pid_of(self, name: str) -> int:
        """Return the process id of a part; 0 while it is down."""
        return int(self.children().get(name, 0))

    def stop(self) -> float:
        """Send what Ctrl-C sends; return the seconds until the supervisor was gone."""
        start = time.monotonic()
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(30)
        return time.monotonic() - start
