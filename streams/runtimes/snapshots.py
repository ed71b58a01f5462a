"""Snapshots of one shard's engine on disk: written whole or not at all, the last two kept, a bad one set aside."""

from __future__ import annotations

import threading
from pathlib import Path

from citybrain.errors import CityBrainError, StorageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES, Files
from streams.engine import Engine
from streams.snapshot import Frozen, save_snapshot

SUFFIX = ".snapshot"
KEPT = 2


def snapshot_paths(folder: Path, files: Files = OS_FILES) -> list[Path]:
    """Return the folder's snapshots, oldest first."""
    return [folder / name for name in files.names(folder) if name.endswith(SUFFIX) and name[0] != "."]


def write_snapshot(engine: Engine, folder: Path) -> Path:
    """Write a snapshot named by the log offset that comes next; remove all but the last two. Raises StorageError."""
    return write_frozen(engine.freeze(), folder)


def write_frozen(frozen: Frozen, folder: Path, files: Files = OS_FILES) -> Path:
    """Write what an engine remembered; it may go on meanwhile. Raises StorageError."""
    path = folder / f"{frozen.header.offset:020d}{SUFFIX}"
    files.make(folder)
    files.replace(path, save_snapshot(*frozen))
    for old in snapshot_paths(folder, files)[:-KEPT]:
        files.remove(old)
    return path


class Saver:
    """Writes an engine's snapshots in a thread of its own, one at a time, while the engine goes on."""

    def __init__(self, folder: Path, files: Files = OS_FILES) -> None:
        self._folder = folder
        self._files = files
        self._thread: threading.Thread | None = None
        self._failure: StorageError | None = None

    @property
    def busy(self) -> bool:
        """Whether the last one is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, frozen: Frozen) -> None:
        """Begin to write; `finish` must have been called for the one before."""
        self._thread = threading.Thread(target=self._write, args=(frozen,), name="snapshot", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the one that is being written; raises StorageError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, frozen: Frozen) -> None:
        try:
            write_frozen(frozen, self._folder, self._files)
        except StorageError as error:
            self._failure = error


def restored_engine(shard: int, layout: Layout) -> tuple[Engine, list[str]]:
    """Return an engine that goes on from the newest good snapshot, or from the beginning; and what was wrong."""
    warnings: list[str] = []
    for path in reversed(snapshot_paths(layout.engine(shard))):
        engine = Engine(shard, layout)
        try:
            engine.restore(OS_FILES.read(path))
        except CityBrainError as error:
            aside = path.with_suffix(".bad")
            OS_FILES.rename(path, aside)
            warnings.append(f"{path}: {error}; kept as {aside.name}, going on from an older one or from the log")
            continue
        return engine, warnings
    return Engine(shard, layout), warnings
