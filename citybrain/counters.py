"""What every component counts: `received_total`, `sent_total`, `dropped_total{reason}`, `errors_total{stage}`.

Counters live in the process and are published once a second as its *heartbeat*, `DATA/run/<process>.json`, which the
API turns into metrics and `citybrain status` reads. They go on from the last heartbeat after a restart.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import real_unix_ms
from citybrain.storage import OS_FILES, storage_error

PERIOD_S = 1.0
STALE_MS = 10_000


class Heartbeat(msgspec.Struct):
    """A process's last words: who it is, when (real time, Unix ms), what it counted, and what else it wants known."""

    process: str
    pid: int
    at: int
    started: int
    counters: dict[str, int]
    gauges: dict[str, float] = {}
    details: dict[str, Any] = {}
    warnings: list[str] = []

    def live(self, now_ms: int) -> bool:
        """Return whether it was written less than 10 s ago."""
        return now_ms - self.at < STALE_MS


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the heartbeats in `DATA/run`; files that are none are left out."""
    found = []
    for name in OS_FILES.names(folder):
        if name.endswith(".heartbeat.json") and name[0] != ".":
            try:
                found.append(msgspec.json.decode(OS_FILES.read(folder / name), type=Heartbeat))
            except msgspec.DecodeError:
                continue
    return found


def process_name(role: str, shards: Sequence[int], count: int) -> str:
    """Return what a process is called that takes these of `count` shards: its role, and which where not all.

    >>> process_name("worker", [0, 2], 4)
    'worker-0-2'
    """
    return role if len(shards) == count else "-".join([role, *map(str, shards)])


def takes_of(process: str, count: int) -> tuple[str, tuple[int, ...]]:
    """Return a process's role and shards by its name; of `count` shards.

    >>> takes_of("worker-0-2", 4), takes_of("ingest", 2)
    (('worker', (0, 2)), ('ingest', (0, 1)))
    """
    role, _, shards = process.partition("-")
    numbers = shards.split("-")
    if not all(number.isdecimal() for number in numbers):
        return process, tuple(range(count))
    return role, tuple(int(number) for number in numbers)


class Counters:
    """Named counters of one process. A name may carry one label: `dropped_total{reason=unknown_device}`."""

    def __init__(self, process: str, folder: Path | None = None) -> None:
        self.process = process
        self.values: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._path = folder / f"{process}.heartbeat.json" if folder is not None else None
        self._started = real_unix_ms()
        self._published_ms = 0

    def resume(self) -> None:
        """Go on counting from the last heartbeat, where there is one."""
        if self._path is None or not self._path.exists():
            return
        try:
            last = msgspec.json.decode(OS_FILES.read(self._path), type=Heartbeat)
        except msgspec.DecodeError:
            return
        self.values.update(last.counters)

    def add(self, name: str, amount: int = 1, **label: str) -> None:
        """Add to `name`, or to `name{key=value}`."""
        if amount:
            key = f"{name}{{{','.join(f'{k}={v}' for k, v in label.items())}}}" if label else name
            self.values[key] += amount

    def drop(self, reason: str, amount: int = 1) -> None:
        """Count readings or messages that were not used, and why (invariant 3)."""
        self.add("dropped_total", amount, reason=reason)

    def warn(self, text: str) -> None:
        """Keep one of the last 50 warnings for whoever looks; one that is repeated at once stands there once."""
        if self.warnings[-1:] != [text]:
            self.warnings.append(text)
        del self.warnings[:-50]

    def publish(self, *, force: bool = False) -> None:
        """Write the heartbeat if a second has passed since the last one."""
        now_ms = real_unix_ms()
        if self._path is None or (not force and 0 <= now_ms - self._published_ms < PERIOD_S * 1000):
            return
        self._published_ms = now_ms
        beat = Heartbeat(
            self.process,
            os.getpid(),
            now_ms,
            self._started,
            dict(self.values),
            self.gauges,
            self.details,
            self.warnings,
        )
        beside = self._path.with_name(f".{self._path.name}")
        try:
            beside.write_bytes(msgspec.json.encode(beat))  # not synced: it is only ever as old as a second
            beside.replace(self._path)
        except OSError as error:  # a full disk must not end a process that could still serve
            self.add("errors_total", stage="heartbeat")
            self.warn(str(storage_error(self._path, error)))
