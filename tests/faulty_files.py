"""A disk that keeps its promises and no more: what was not synced may be lost, in any order, sector by sector.

It implements `citybrain.storage.Files` in memory. `crash()` is a power loss: of every write since a file's last sync
each 512-byte sector survives or not by itself, so a later record can be there where an earlier one is not.
"""

from __future__ import annotations

import random
from pathlib import Path

from citybrain.errors import DiskFull, StorageError

SECTOR = 512


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.synced = bytearray(data)
        self.now = bytearray(data)


class LossyHandle:
    def __init__(self, disk: LossyFiles, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._generation = disk.generation

    def _file(self) -> _File:
        if self._generation != self._disk.generation:
            raise StorageError(f"{self._path}: the machine this was opened on has lost power")
        return self._disk.files[self._path]

    def write(self, data: bytes) -> None:
        file = self._file()
        if self._disk.capacity is not None and self._disk.used() + len(data) > self._disk.capacity:
            raise DiskFull(f"{self._path}: no space left on the device")
        file.now += data

    def sync(self) -> None:
        if self._disk.failing_syncs:
            self._disk.failing_syncs -= 1
            raise StorageError(f"{self._path}: Input/output error")
        file = self._file()
        file.synced[:] = file.now

    def truncate(self, size: int) -> None:
        file = self._file()
        del file.now[size:]
        file.synced[:] = file.now

    def close(self) -> None:
        pass


class LossyFiles:
    """`capacity` in bytes limits the disk; `failing_syncs` makes that many syncs fail."""

    def __init__(self, seed: int = 0) -> None:
        self.files: dict[Path, _File] = {}
        self.marks: dict[Path, int] = {}
        self.capacity: int | None = None
        self.failing_syncs = 0
        self.generation = 0
        self._random = random.Random(seed)

    def used(self) -> int:
        return sum(len(file.now) for file in self.files.values())

    def crash(self) -> None:
        """Lose power: every open handle is dead, unsynced sectors survive or not, marks are anything older."""
        self.generation += 1
        for file in self.files.values():
            kept = bytearray(file.synced)
            for start in range(len(file.synced) // SECTOR * SECTOR, len(file.now), SECTOR):
                if self._random.random() < 0.5:
                    end = min(start + SECTOR, len(file.now))
                    kept.extend(b"\0" * (end - len(kept)))
                    kept[max(start, len(file.synced)) : end] = file.now[max(start, len(file.synced)) : end]
            file.now[:] = kept
            file.synced[:] = kept
        self.marks = {path: self._random.randint(0, value) for path, value in self.marks.items()}

    def append(self, path: Path) -> LossyHandle:
        self.files.setdefault(path, _File())
        return LossyHandle(self, path)

    def read(self, path: Path, start: int = 0, size: int = -1) -> bytes:
        try:
            data = self.files[path].now
        except KeyError:
            raise StorageError(f"{path}: no such file") from None
        return bytes(data[start:] if size < 0 else data[start : start + size])

    def size(self, path: Path) -> int:
        return len(self.files[path].now) if path in self.files else 0

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in self.files if path.parent == folder)

    def make(self, folder: Path) -> None:
        pass

    def replace(self, path: Path, data: bytes) -> None:
        if self.capacity is not None and self.used() + len(data) > self.capacity:  # the old one stays until it is there
            raise DiskFull(f"{path}: no space left on the device")
        self.files[path] = _File(data)

    def rename(self, old: Path, new: Path) -> None:
        self.files[new] = self.files.pop(old)

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)

    def mark(self, path: Path, value: int) -> None:
        self.marks[path] = value

    def marked(self, path: Path) -> int:
        return self.marks.get(path, 0)
