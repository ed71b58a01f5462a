"""How often the spool is synced: events and pictures at once, telemetry together, because an SD card wears by the sync.

What waits for its sync is not sent, and a power loss takes it: at most `every_s` of telemetry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from citybrain.model import Lane, Reading
from gateway.spool import Spool

EVERY_S = 10.0


class Paced:
    """A spool as the agent sees it (`edge.agent.Sink`). Call `commit` as often as you like, `flush` at a clean stop."""

    def __init__(self, spool: Spool, mono_s: Callable[[], float], every_s: float = EVERY_S) -> None:
        self.spool = spool
        self._mono_s = mono_s
        self._every_s = every_s
        self._since_s: float | None = None  # when the first telemetry was appended that waits

    def append(self, lane: Lane, readings: Sequence[Reading], at_ms: int) -> int:
        """Number readings as messages; see `Spool.append`."""
        if lane is Lane.TELEMETRY and readings and self._since_s is None:
            self._since_s = self._mono_s()
        return self.spool.append(lane, readings, at_ms)

    def commit(self) -> None:
        """Sync what is due; raises what `Spool.commit` raises."""
        if self._since_s is not None and self._mono_s() - self._since_s >= self._every_s:
            self.flush()
        else:
            self.spool.commit(Lane.EVENT, Lane.BLOB)

    def flush(self) -> None:
        """Sync everything."""
        self._since_s = None
        self.spool.commit()
