"""A real VictoriaMetrics for tests, from the system's package: it takes InfluxDB 2 writes and answers PromQL.

Where it is missing the tests are skipped and say why, but with CI=true they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually, unused_port

PROGRAM = "victoria-metrics"


class Victoria:
    """One server on a free loopback port, with data of its own. It can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            why = f"{PROGRAM} is not installed (apt-get install victoria-metrics)"
            if os.environ.get("CI") == "true":
                pytest.fail(why)
            pytest.skip(why)
        self.folder, self.port = folder, unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._program = program
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def argv(self) -> list[str]:
        """The command line that starts it."""
        return [
            self._program, f"-httpListenAddr=127.0.0.1:{self.port}", f"-storageDataPath={self.folder}",
            "-retentionPeriod=100y", "-dedup.minScrapeInterval=1ms", "-search.latencyOffset=0s",
            "-memory.allowedBytes=128MB",
        ]  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with (self.folder.parent / "victoria.log").open("ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log)
        eventually(lambda: accepts("127.0.0.1", self.port), 20, "VictoriaMetrics listening")

    def kill(self) -> None:
        """End it as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        if self.process is not None:
            end(self.process)

    def query(self, text: str, at_s: float) -> list[dict[str, Any]]:
        """Return the result of an instant query; what was just written is made visible first."""
        httpx.get(f"{self.url}/internal/force_flush", timeout=10).raise_for_status()
        found = httpx.get(f"{self.url}/api/v1/query", params={"query": text, "time": str(at_s)}, timeout=20)
        assert found.status_code == 200, found.text
        result: list[dict[str, Any]] = found.json()["data"]["result"]
        return result

    def samples(self, match: str = '{device!=""}') -> list[tuple[str, str, int, float]]:
        """Return (metric, device, Unix ms, value) of all samples of series that match."""
        httpx.get(f"{self.url}/internal/force_flush", timeout=10).raise_for_status()
        found = httpx.get(f"{self.url}/api/v1/export", params={"match[]": match, "reduce_mem_usage": "0"}, timeout=30)
        assert found.status_code == 200, found.text
        rows = [json.loads(line) for line in found.text.splitlines()]
        return sorted(
            (row["metric"]["__name__"], row["metric"]["device"], at, value)
            for row in rows
            for at, value in zip(row["timestamps"], row["values"], strict=True)
        )


@pytest.fixture
def victoria(tmp_path: Path) -> Iterator[Victoria]:
    """A server of this test alone."""
    server = Victoria(tmp_path / "victoria")
    try:
        server.start()
        yield server
    finally:
        server.end()
