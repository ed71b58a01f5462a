"""The few file operations whose order decides what survives a power loss.

`Files` is what segments and mailboxes are written through: `OsFiles` is the real one; the tests have one that loses
and reorders whatever was not synced. An error from sync is final: the kernel may have dropped the pages, so the caller
must end the process instead of trying again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Protocol

from citybrain.errors import DiskFull, StorageError


class Handle(Protocol):
    """A file open for appending."""

    def write(self, data: bytes) -> None: ...
    def sync(self) -> None: ...
    def truncate(self, size: int) -> None: ...
    def close(self) -> None: ...


class Files(Protocol):
    """What a durable store needs of a disk. Paths are absolute or relative to the working directory."""

    def append(self, path: Path) -> Handle: ...
    def read(self, path: Path, start: int = 0, size: int = -1) -> bytes: ...
    def size(self, path: Path) -> int: ...
    def names(self, folder: Path) -> list[str]: ...
    def make(self, folder: Path) -> None: ...
    def replace(self, path: Path, data: bytes) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def remove(self, path: Path) -> None: ...
    def mark(self, path: Path, value: int) -> None: ...
    def marked(self, path: Path) -> int: ...


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return our error for the operating system's, naming the path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{path}: no space left on the device; free some, what is written is kept")
    return StorageError(f"{path}: {error.strerror or error}")


def replace_unsynced(path: Path, data: bytes) -> None:
    """Put a file's new content in place whole, without a sync: it is written again soon. Raises OSError."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(data)
    beside.replace(path)


class OsHandle:
    """A file opened O_APPEND on the real disk. A short or failed write is cut off again, so a later one fits."""

    _fd = -1  # none open: not yet, or not any more

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._fd = descriptor

    def write(self, data: bytes) -> None:
        before = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, before)
            raise storage_error(self._path, error) from error

    def sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise storage_error(self._path, error) from error

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        descriptor, self._fd = self._fd, -1
        os.close(descriptor)

    def __del__(self) -> None:
        """Let go of the file where its owner was dropped without closing it, as Python's own files do."""
        if self._fd >= 0:
            os.close(self._fd)


class OsFiles:
    """The real disk."""

    def append(self, path: Path) -> OsHandle:
        """Open for appending; a new file's directory entry is synced before anything is written to it.

        A new file that could not be synced is taken away again: a segment that nobody writes to would hide what its
        predecessor is given.
        """
        new = not path.exists()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            if new:
                self._sync_folder(path.parent)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise storage_error(path, error) from error
        return OsHandle(path, descriptor)

    def read(self, path: Path, start: int = 0, size: int = -1) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise storage_error(path, error) from error

    def size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208  names, not paths
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(folder, error) from error

    def make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sync_folder(folder.parent)
        except OSError as error:
            raise storage_error(folder, error) from error

    def replace(self, path: Path, data: bytes) -> None:
        """Write a whole file so that a crash leaves the old or the new one, never a mixture."""
        self._replace(path, data, 0o666)

    def replace_private(self, path: Path, data: bytes) -> None:
        """Write a whole file as `replace` does, at no moment readable by anybody but its owner: a key."""
        self._replace(path, data, 0o600)

    def _replace(self, path: Path, data: bytes, mode: int) -> None:
        beside = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            self._sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise storage_error(path, error) from error

    def rename(self, old: Path, new: Path) -> None:
        try:
            old.replace(new)
            self._sync_folder(new.parent)
        except OSError as error:
            raise storage_error(old, error) from error

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def mark(self, path: Path, value: int) -> None:
        """Publish a number to other processes; not durable, and not meant to be."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.pwrite(descriptor, value.to_bytes(8, "little"), 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error(path, error) from error

    def marked(self, path: Path) -> int:
        try:
            with path.open("rb") as file:
                return int.from_bytes(file.read(8), "little")
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise storage_error(path, error) from error

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


OS_FILES = OsFiles()
