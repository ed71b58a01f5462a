"""What every component counts: `received_total`, `sent_total`, `dropped_total{reason}`, `errors_total{stage}`.

Counters live in the process and are published once a second as its *heartbeat*, `DATA/run/<process>.json`, which the
API turns into metrics and `citybrain status` reads. They go on from the last heartbeat after a restart. The heartbeat
also says what was counted in the last minute, and how long things took in the last minutes: who only looks now and
then could not know.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import monotonic_s, real_unix_ms
from citybrain.storage import OS_FILES, replace_unsynced, storage_error

PERIOD_S = 1.0
STALE_MS = 10_000
MARK_S = 5.0  # the counters are remembered that often, for what was counted in the last minute
MARKS = 13  # 12 steps are a minute
SLOT_S, SLOTS = 30.0, 10  # delays of the last 5 minutes, forgotten half a minute at a time
# Upper ends of the sizes a delay is counted by: 1 ms to 16 h in steps of a quarter; 2 s, the bar, is one of them.
BOUNDS_S = tuple(round(2.0 * 1.25**step, 6) for step in range(-34, 47))


class Delay(msgspec.Struct, frozen=True):
    """How long something took in the last 5 minutes, in real seconds: its percentiles, each rounded up to a size.

    latest: the longest since the last heartbeat, 0 where there was none. counts: by size (`BOUNDS_S`, the last one
    open) since the process started.
    """

    p50: float
    p99: float
    most: float
    latest: float
    amount: int
    counts: tuple[int, ...]


def percentile(counts: Mapping[int, int] | tuple[int, ...] | list[int], share: float) -> float:
    """Return the size below which `share` of what was counted lies, 0 where nothing was; the open end is infinite.

    >>> percentile({BOUNDS_S.index(2.0): 99, BOUNDS_S.index(2.5): 1}, 0.99)
    2.0
    """
    pairs = sorted(counts.items()) if isinstance(counts, Mapping) else list(enumerate(counts))
    wanted = share * sum(amount for _, amount in pairs)
    passed = 0
    for size, amount in pairs:
        passed += amount
        if amount and passed >= wanted:
            return BOUNDS_S[size] if size < len(BOUNDS_S) else float("inf")
    return 0.0


class Delays:
    """Delays of one kind, counted by size: the last minutes and all of them."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._slots: deque[tuple[float, Counter[int], float]] = deque(maxlen=SLOTS)
        self._latest = 0.0

    def add(self, seconds: float, amount: int = 1) -> None:
        """Count `amount` things that took `seconds` each (a clock that was set back counts as none)."""
        seconds = max(0.0, seconds)
        size = bisect_left(BOUNDS_S, seconds)
        slot_s = monotonic_s() // SLOT_S
        if not self._slots or self._slots[-1][0] != slot_s:
            self._slots.append((slot_s, Counter(), 0.0))
        _, counts, most = self._slots[-1]
        counts[size] += amount
        self._slots[-1] = (slot_s, counts, max(most, seconds))
        self._counts[size] += amount
        self._latest = max(self._latest, seconds)

    def told(self) -> Delay:
        """Return what the heartbeat says of them, and begin anew with `latest`."""
        since = monotonic_s() // SLOT_S - SLOTS
        recent: Counter[int] = Counter()
        most = 0.0
        for slot_s, counts, worst in self._slots:
            if slot_s > since:
                recent += counts
                most = max(most, worst)
        latest, self._latest = self._latest, 0.0
        p50, p99 = (round(min(percentile(recent, share), most), 3) for share in (0.5, 0.99))
        return Delay(p50, p99, round(most, 3), round(latest, 3), recent.total(), tuple(self._counts))


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
    per_minute: dict[str, float] = {}  # what the counters rose by in the last minute (real time)
    delays: dict[str, Delay] = {}

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

    Desks are told apart by a name, and each of them takes all: `desk-b`.
    """
    role, _, shards = process.partition("-")
    numbers = shards.split("-")
    if role == "desk" or not all(number.isdecimal() for number in numbers):
        return role if role == "desk" else process, tuple(range(count))
    return role, tuple(int(number) for number in numbers)


class Counters:
    """Named counters of one process. A name may carry one label: `dropped_total{reason=unknown_device}`."""

    def __init__(self, process: str, folder: Path | None = None) -> None:
        self.process = process
        self.values: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.delays: dict[str, Delays] = {}
        self.probes: list[Callable[[], None]] = []  # called before each heartbeat, for what is dear to keep up to date
        self._marks: deque[tuple[float, dict[str, int]]] = deque(maxlen=MARKS)
        self._path = folder / f"{process}.heartbeat.json" if folder is not None else None
        self._started = real_unix_ms()
        self._published_ms = 0

    def resume(self) -> Heartbeat | None:
        """Go on counting from the last heartbeat, where there is one; return it."""
        if self._path is None or not self._path.exists():
            return None
        try:
            last = msgspec.json.decode(OS_FILES.read(self._path), type=Heartbeat)
        except msgspec.DecodeError:
            return None
        self.values.update(last.counters)
        return last

    def add(self, name: str, amount: int = 1, **label: str) -> None:
        """Add to `name`, or to `name{key=value}`."""
        if amount:
            key = f"{name}{{{','.join(f'{k}={v}' for k, v in label.items())}}}" if label else name
            self.values[key] += amount

    def drop(self, reason: str, amount: int = 1) -> None:
        """Count readings or messages that were not used, and why (invariant 3)."""
        self.add("dropped_total", amount, reason=reason)

    def delayed(self, name: str, seconds: float, amount: int = 1) -> None:
        """Count `amount` things that took `seconds` (real time) each, such as `lag_s` of what was just taken."""
        if amount:
            self.delays.setdefault(name, Delays()).add(seconds, amount)

    def per_minute(self) -> dict[str, float]:
        """Return what every counter that rose in the last minute rose by, in the mean, in a minute of real time."""
        now_s = monotonic_s()
        if not self._marks or now_s - self._marks[-1][0] >= MARK_S:
            self._marks.append((now_s, dict(self.values)))
        since_s, before = self._marks[0]
        if now_s - since_s < MARK_S:
            return {}
        rises = {name: value - before.get(name, 0) for name, value in self.values.items()}
        return {name: round(rise * 60 / (now_s - since_s), 2) for name, rise in rises.items() if rise > 0}

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
        for probe in self.probes:
            probe()
        beat = Heartbeat(
            self.process,
            os.getpid(),
            now_ms,
            self._started,
            dict(self.values),
            self.gauges,
            self.details,
            self.warnings,
            self.per_minute(),
            {name: delays.told() for name, delays in self.delays.items()},
        )
        try:
            replace_unsynced(self._path, msgspec.json.encode(beat))
        except OSError as error:  # a full disk must not end a process that could still serve
            self.add("errors_total", stage="heartbeat")
            self.warn(str(storage_error(self._path, error)))
