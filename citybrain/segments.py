"""Append-only records in segment files: what the gateway's spool, the log and the transition log are made of.

    record  = length u32 · crc32c u32 · header · payload        length and crc cover header and payload
    header  = offset u64 · received_at i64 · kind u8 · 7 × 0

A segment is named by the offset of its first record. Offsets are dense. A torn end (the last record of the last
segment, half written) is cut and kept aside as `*.torn`; damage before valid records means that the disk lied, so the
segment is set aside as `*.damaged`, and what follows goes on behind it. A `committed` mark tells readers in other
processes how far everything is synced, so nobody acts on a record that a power loss could take back.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from citybrain.errors import Damaged, DiskFull, StorageError
from citybrain.storage import OS_FILES, Files, Handle
from citybrain.wire import crc32c

FRAME = struct.Struct("<II")
HEADER = struct.Struct("<QqB7x")
OVERHEAD = FRAME.size + HEADER.size
MAX_RECORD = 4 * 1024 * 1024
SEGMENT_BYTES = 64 * 1024 * 1024
SUFFIX = ".seg"


class Record(msgspec.Struct, frozen=True):
    """One record: its offset, when it was received (Unix ms, platform time), its kind (0..255) and its bytes."""

    offset: int
    received_at: int
    kind: int
    payload: bytes


class Scan(msgspec.Struct):
    """What reading a segment's bytes found: complete records, where they end, and what is wrong there, if anything."""

    records: list[Record]
    end: int
    fault: str = ""


def pack(record: Record) -> bytes:
    """Return a record as it stands in a segment."""
    inner = HEADER.pack(record.offset, record.received_at, record.kind) + record.payload
    return FRAME.pack(len(inner), crc32c(inner)) + inner


def scan(data: bytes, first: int | None = None, start: int = 0) -> Scan:
    """Read records from `data[start:]` until it ends or is wrong; `first` is the offset that must come first."""
    found = Scan([], start)
    position, size, expected = start, len(data), first
    while position < size:
        if size - position < OVERHEAD:
            found.fault = "half a record header"
            break
        length, crc = FRAME.unpack_from(data, position)
        if not HEADER.size <= length <= MAX_RECORD:
            found.fault = f"record length {length}"
            break
        inner = data[position + FRAME.size : position + FRAME.size + length]
        if len(inner) < length:
            found.fault = f"record of {length} bytes, {len(inner)} are there"
            break
        if crc32c(inner) != crc:
            found.fault = "checksum differs"
            break
        offset, received_at, kind = HEADER.unpack_from(inner)
        if expected is not None and offset != expected:
            found.fault = f"offset {offset}, expected {expected}"
            break
        expected = offset + 1
        found.records.append(Record(offset, received_at, kind, inner[HEADER.size :]))
        position += FRAME.size + length
        found.end = position
    return found


def valid_record_after(data: bytes, start: int, least: int) -> bool:
    """Return whether a whole record with offset >= `least` stands anywhere behind `start`: damage, not a torn end."""
    for position in range(start + 1, len(data) - OVERHEAD + 1):
        length, crc = FRAME.unpack_from(data, position)
        if not HEADER.size <= length <= min(MAX_RECORD, len(data) - position - FRAME.size):
            continue
        inner = data[position + FRAME.size : position + FRAME.size + length]
        if HEADER.unpack_from(inner)[0] >= least and crc32c(inner) == crc:
            return True
    return False


def segment_name(first: int) -> str:
    """Return the file name of the segment whose first record has offset `first`."""
    return f"{first:020d}{SUFFIX}"


def segments(files: Files, folder: Path) -> list[int]:
    """Return the first offsets of the folder's segments, in order."""
    names = (name.removesuffix(SUFFIX) for name in files.names(folder) if name.endswith(SUFFIX))
    return [int(name) for name in names if name.isdecimal()]


class Writer:
    """The one writer of a folder of segments. `append` buffers; `commit` writes and syncs; only then is it there.

    `start()` recovers: it must be called first. `warnings` then says what was cut or set aside.
    """

    def __init__(self, folder: Path, files: Files = OS_FILES, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.next_offset = 0
        self.committed = 0
        self.segment = 0  # first offset of the segment that is written to
        self._mark = folder / "committed"
        self._files = files
        self._segment_bytes = segment_bytes
        self._handle: Handle | None = None
        self._size = 0
        self._buffer: list[bytes] = []
        self._broken = False

    def start(self, first: int = 0) -> None:
        """Open the folder, recovering the last segment; an empty folder starts at offset `first`."""
        self._files.make(self.folder)
        self.next_offset = first
        found = segments(self._files, self.folder)
        if found:
            self.next_offset = self._recover(found[-1])
        else:
            self._open(first)
        self.committed = self.next_offset
        self._files.mark(self._mark, self.committed)

    def _recover(self, first: int) -> int:
        path = self.folder / segment_name(first)
        data = self._files.read(path)
        result = scan(data, first)
        following = first + len(result.records)
        if result.fault:
            if valid_record_after(data, result.end, following):
                return self._set_aside(first, path, data, result)
            kept = self._keep_torn(path.with_suffix(f".{result.end}.torn"), data[result.end :])
            self.warnings.append(f"{path} at byte {result.end}: torn end cut ({result.fault}), {kept}")
        self._handle = self._files.append(path)
        if result.fault:
            self._handle.truncate(result.end)
        self._handle.sync()  # what an earlier process wrote and could not sync any more
        self._size = result.end
        self.segment = first
        return following

    def _keep_torn(self, path: Path, data: bytes) -> str:
        """Keep a torn end for whoever looks into it; a full disk must not keep a store from starting."""
        try:
            self._files.replace(path, data)
        except DiskFull:
            return "not kept: no space left on the device"
        return "kept beside it"

    def _set_aside(self, first: int, path: Path, data: bytes, result: Scan) -> int:
        """Keep a damaged segment aside, its good beginning in place, and go on behind the last offset it can hold."""
        beyond = highest_offset(data, result.end, first + len(result.records)) + 1
        self._files.replace(path.with_suffix(".damaged"), data)
        self._files.replace(path, data[: result.end])
        self.warnings.append(
            f"{path} at byte {result.end}: {result.fault} before valid records; segment kept as .damaged, "
            f"offsets {first + len(result.records)}..{beyond - 1} are missing"
        )
        self._open(beyond)
        return beyond

    def _open(self, first: int) -> None:
        before, self._handle = self._handle, self._files.append(self.folder / segment_name(first))
        self._size = 0
        self.segment = first
        if before is not None:
            before.close()

    def append(self, kind: int, received_at: int, payload: bytes) -> int:
        """Buffer a record and return its offset; it is lost unless `commit` returns. Raises StorageError: too large."""
        if len(payload) > MAX_RECORD - HEADER.size:
            raise StorageError(f"{self.folder}: record of {len(payload)} bytes, at most {MAX_RECORD} fit")
        offset = self.next_offset
        self._buffer.append(pack(Record(offset, received_at, kind, payload)))
        self.next_offset += 1
        return offset

    def discard(self) -> None:
        """Forget what was appended since the last commit; its offsets are given out again."""
        self._buffer.clear()
        self.next_offset = self.committed

    def commit(self) -> int:
        """Write and sync what was appended; return the offset behind it.

        Raises DiskFull with nothing written and the buffer dropped: the offsets are given out again. Any other
        StorageError leaves the writer broken, because a failed sync cannot be repeated.
        """
        if self._broken or self._handle is None:
            raise StorageError(f"{self.folder}: not open, or a sync failed; the process must end")
        if not self._buffer:
            return self.committed
        data = b"".join(self._buffer)
        self._buffer.clear()
        try:
            if self._size and self._size + len(data) > self._segment_bytes:
                self._open(self.committed)
            self._handle.write(data)
        except DiskFull:
            self.next_offset = self.committed
            raise
        except StorageError:
            self._broken = True
            raise
        self._sync()
        self._size += len(data)
        self.committed = self.next_offset
        with contextlib.suppress(DiskFull):  # all is synced: readers only learn of it with a later mark
            self._files.mark(self._mark, self.committed)
        return self.committed

    def roll(self) -> None:
        """Go on in a new segment, so that `drop_before` can remove all that is committed; raises StorageError."""
        if self._size:
            self._open(self.committed)

    def _sync(self) -> None:
        try:
            if self._handle is not None:
                self._handle.sync()
        except StorageError:  # DiskFull too: the pages may be gone
            self._broken = True
            raise

    @property
    def first_offset(self) -> int:
        """The lowest offset still on disk."""
        found = segments(self._files, self.folder)
        return found[0] if found else self.next_offset

    def drop_before(self, offset: int) -> int:
        """Remove whole segments that hold only records before `offset`; return how many."""
        found = segments(self._files, self.folder)
        dropped = 0
        for first, following in pairwise(found):
            if following > offset:
                break
            self._files.remove(self.folder / segment_name(first))
            dropped += 1
        return dropped

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def highest_offset(data: bytes, start: int, least: int) -> int:
    """Return the highest offset of any whole record behind `start`, at least `least`."""
    highest, position = least, start
    while position < len(data) - OVERHEAD + 1:
        length, crc = FRAME.unpack_from(data, position)
        if HEADER.size <= length <= min(MAX_RECORD, len(data) - position - FRAME.size):
            inner = data[position + FRAME.size : position + FRAME.size + length]
            offset = HEADER.unpack_from(inner)[0]
            if offset >= least and crc32c(inner) == crc:
                highest = max(highest, offset)
                position += FRAME.size + length
                continue
        position += 1
    return highest


class Reader:
    """Reads a folder of segments from an offset on, also while another process writes it."""

    def __init__(self, folder: Path, offset: int = 0, files: Files = OS_FILES) -> None:
        self.folder = folder
        self.offset = offset
        self._files = files
        self._first = -1  # the segment we are in, and the byte behind the last record we took from it
        self._position = 0

    def read(self, most_bytes: int = 8 * 1024 * 1024) -> list[Record]:
        """Return the next committed records, up to about `most_bytes`; an empty list where there are none yet.

        Missing offsets (retention, a segment set aside) are skipped: compare `Record.offset` with what you expected.
        Raises Damaged where a committed record cannot be read.
        """
        committed = self._files.marked(self.folder / "committed")
        if self.offset >= committed:
            return []
        found = segments(self._files, self.folder)
        at = max((first for first in found if first <= self.offset), default=found[0] if found else -1)
        if at < 0:
            return []
        if at != self._first:
            self._first, self._position = at, 0
        records = self._take(at, committed, most_bytes)
        if records:
            return records
        later = [first for first in found if first > at]
        if later and later[0] < committed:
            self.offset, self._first, self._position = max(self.offset, later[0]), later[0], 0
            return self._take(later[0], committed, most_bytes)
        return []

    def _take(self, first: int, committed: int, most_bytes: int) -> list[Record]:
        path = self.folder / segment_name(first)
        taken: list[Record] = []
        while not taken:
            data = self._files.read(path, self._position, max(most_bytes, MAX_RECORD + OVERHEAD))
            if not data:
                return []
            result = scan(data)
            wanted = [record for record in result.records if record.offset < committed]
            if not result.records:
                raise Damaged(str(path), self._position, result.fault)
            if not wanted:
                return []
            self._position += sum(OVERHEAD + len(record.payload) for record in wanted)
            taken = [record for record in wanted if record.offset >= self.offset]
        self.offset = taken[-1].offset + 1
        return taken

    def __iter__(self) -> Iterator[Record]:
        """Yield every record that is committed now."""
        while records := self.read():
            yield from records
