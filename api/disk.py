"""How full the data folder's disk is, and how fast the folder grows: looked at once a minute by the API's thread."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from pathlib import Path

import msgspec

from citybrain.clock import monotonic_s

LOOK_S = 60.0
LEAST_S = 300.0  # shorter than this, one segment that was just begun looks like a trend
KEPT = 24 * 60  # a day of looks
DAY_S = 86_400.0


class Disk(msgspec.Struct, frozen=True):
    """Bytes of the disk, of the data folder, and what the folder grows by in a (real) day; None until it is known."""

    total: int
    free: int
    data: int
    grows_per_day: float | None = None

    @property
    def used_share(self) -> float:
        return 1.0 - self.free / self.total if self.total else 0.0

    @property
    def full_in_days(self) -> float | None:
        """When there is no room left, if it goes on like this; None where it does not grow, or nobody knows yet."""
        return self.free / self.grows_per_day if self.grows_per_day and self.grows_per_day > 0 else None


def folder_bytes(folder: Path) -> int:
    """Return what the files below a folder take; files that go away meanwhile count nothing."""
    total = 0
    for path, _, names in os.walk(folder):  # what it cannot list it leaves out
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118  a Path for each is dear
    return total


class DiskWatch:
    """One folder's disk. `look` is called by one thread, often; `told` by any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looks: deque[tuple[float, int]] = deque(maxlen=KEPT)

    def look(self) -> None:
        """Measure the folder where the last time is a minute ago; raises OSError."""
        now_s = monotonic_s()
        if not self._looks or now_s - self._looks[-1][0] >= LOOK_S:
            self._looks.append((now_s, folder_bytes(self._folder)))

    def told(self) -> Disk:
        """Return how things stand; raises OSError."""
        usage = shutil.disk_usage(self._folder)
        if not self._looks:
            return Disk(usage.total, usage.free, 0)
        (first_s, first), (last_s, last) = self._looks[0], self._looks[-1]
        passed_s = last_s - first_s
        grows = (last - first) * DAY_S / passed_s if passed_s >= LEAST_S else None
        return Disk(usage.total, usage.free, last, grows)
