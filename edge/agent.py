"""The agent: asks the sources what is due and hands it to the spool, events at once, telemetry in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from citybrain.model import Lane, Reading

BATCH_READINGS = 100
LINGER_MS = 1000


class Source(Protocol):
    """What a sensor, a bus or a simulation gives: the readings that are due at `now_ms`, each with its lane."""

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]: ...


class Sink(Protocol):
    """Where readings become safe: `gateway.spool.Spool`, or anything that numbers and syncs."""

    def append(self, lane: Lane, readings: Sequence[Reading], at_ms: int) -> int: ...

    def commit(self) -> None: ...


class Agent:
    """Moves readings from sources to the sink, one message a batch.

    Telemetry waits at most `linger_ms` for company, or until `batch` readings are there; an event takes what waits
    along, because one sync costs as much as two. What waits is not safe yet.
    """

    def __init__(
        self, sources: Sequence[Source], sink: Sink, batch: int = BATCH_READINGS, linger_ms: int = LINGER_MS
    ) -> None:
        self.sources = list(sources)
        self.sink = sink
        self._batch = batch
        self._linger_ms = linger_ms
        self._waiting: list[Reading] = []
        self._since_ms = 0

    def step(self, now_ms: int) -> int:
        """Ask every source once; return how many readings it gave. Raises what `commit` of the sink raises."""
        events: list[Reading] = []
        taken = 0
        for source in self.sources:
            for lane, reading in source.poll(now_ms):
                taken += 1
                if lane is Lane.EVENT:
                    events.append(reading)
                else:
                    self._since_ms = self._since_ms if self._waiting else now_ms
                    self._waiting.append(reading)
        due = len(self._waiting) >= self._batch or not 0 <= now_ms - self._since_ms < self._linger_ms
        if events or (self._waiting and due):
            self._hand_over(events, now_ms)
        return taken

    def flush(self, now_ms: int) -> None:
        """Hand over what still waits; for a clean stop."""
        if self._waiting:
            self._hand_over([], now_ms)

    def _hand_over(self, events: list[Reading], now_ms: int) -> None:
        self.sink.append(Lane.EVENT, events, now_ms)
        for start in range(0, len(self._waiting), self._batch):
            self.sink.append(Lane.TELEMETRY, self._waiting[start : start + self._batch], now_ms)
        self._waiting.clear()
        self.sink.commit()
