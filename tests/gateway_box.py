"""A gateway's data folder for tests, its process, and the platform's end of the wire."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from citybrain.counters import Heartbeat
from tests.conftest import end, eventually

GATEWAY, SHARD = "gw-0007", 1


def config_text(port: int, drivers: str = "drivers: {}\n", **changed: Any) -> str:
    """Return a gateway.yaml for a broker on loopback."""
    lines = [f"gateway: {changed.get('gateway', GATEWAY)}", f"shard: {changed.get('shard', SHARD)}"]
    lines += ["broker:", f"  host: {changed.get('host', '127.0.0.1')}", f"  port: {port}"]
    if "tls" in changed:
        lines.append(f"  tls: {changed['tls']}")
    lines += ["spool: {commit_every: 200ms}", drivers]
    return "\n".join(lines)


class Process:
    """`citybrain gateway run` as a process of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        command = [sys.executable, "-P", "-m", "citybrain", "gateway", "run", "--data", str(folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})

    def beat(self) -> Heartbeat | None:
        path = self.folder / "run" / "gateway.heartbeat.json"
        if not path.exists():
            return None
        beat = msgspec.json.decode(path.read_bytes(), type=Heartbeat)
        return beat if beat.pid == self.process.pid else None

    def online(self) -> bool:
        beat = self.beat()
        return beat is not None and beat.gauges.get("online") == 1.0

    def wait_online(self) -> None:
        eventually(self.online, 20, "the gateway being online")

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def stop(self) -> int:
        end(self.process)
        return int(self.process.returncode)
