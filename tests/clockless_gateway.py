"""`citybrain gateway run` on a machine that has just booted without a battery: its system clock is told by a file.

    python -m tests.clockless_gateway DATA FILE

FILE: by how many ms the system's clock is off; where it does not exist it is right. Nothing keeps it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from citybrain.clock import monotonic_s, real_unix_ms
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.storage import OS_FILES
from gateway.run import GatewayProcess
from gateway.times import BoxClock


def main(data: Path, off: Path) -> None:
    """Serve until SIGTERM."""
    booted_s = monotonic_s()

    def system() -> int:
        return real_unix_ms() + (int(off.read_text() or 0) if off.exists() else 0)

    def clock(mark: Path, counters: Counters) -> BoxClock:
        return BoxClock(mark, counters, OS_FILES, system, lambda: monotonic_s() - booted_s, lambda: False, boot=2)

    process = GatewayProcess(Layout(data), clock=clock)
    signal.signal(signal.SIGTERM, process.stop)
    process.run()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
