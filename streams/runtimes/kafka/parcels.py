"""What a Kafka record holds: a parcel, the log records of one commit, or of a part of it where it is large.

    parcel = mark 4 s · count u32 · number u64 · first u64 · segment u64 · count × record
    record = length u32 · received_at i64 · kind u8 · 3 × 0 · payload               length is that of the payload

`number` is the Kafka offset at which its writer believed it would be stored; **a parcel counts only there**. `first` is
the log offset of its first record: the log's offsets are dense and the same as on disk, whatever Kafka's are. `segment`
is the log offset at which the part of the log began that the writer was in (`streams.logs.LogWriter.segment`).
"""

from __future__ import annotations

import struct

import msgspec

from citybrain.errors import Damaged, StorageError
from citybrain.segments import HEADER, MAX_RECORD, Record

HEAD = struct.Struct("<4sIQQQ")
ENTRY = struct.Struct("<IqB3x")
FAMILY, VERSION = b"cbp", 1
MARK = FAMILY + bytes((VERSION,))
PARCEL_BYTES = 512 * 1024  # a commit beyond is cut: a reader that begins inside has little to skip
MOST_PAYLOAD = MAX_RECORD - HEADER.size  # as on disk
MOST_BYTES = HEAD.size + ENTRY.size + MOST_PAYLOAD
NOWHERE = 2**64 - 1  # the number of a parcel that is to count nowhere


class Parcel(msgspec.Struct, frozen=True):
    """A parcel that counts: where it stands in Kafka, and which log records it holds."""

    place: int
    first: int
    count: int
    segment: int
    value: bytes

    @property
    def next(self) -> int:
        """The log offset behind its last record."""
        return self.first + self.count

    def records(self) -> list[Record]:
        """Return the log records; raises Damaged where they do not fill the parcel."""
        value, at = self.value, HEAD.size
        found: list[Record] = []
        for offset in range(self.first, self.next):
            if len(value) - at < ENTRY.size:
                break
            length, received_at, kind = ENTRY.unpack_from(value, at)
            at += ENTRY.size + length
            found.append(Record(offset, received_at, kind, value[at - length : at]))
        if at != len(value) or len(found) != self.count:
            raise Damaged(f"Kafka record {self.place}", at, f"{self.count} log records do not fill {len(value)} bytes")
        return found


def opened(place: int, value: bytes) -> Parcel | None:
    """Return the parcel at a Kafka offset, None where none counts there; raises Damaged: of another version."""
    if len(value) < HEAD.size or value[:3] != FAMILY:
        return None
    mark, count, number, first, segment = HEAD.unpack_from(value)
    if mark != MARK:
        raise Damaged(
            f"Kafka record {place}", 0, f"written in format {mark[3]}, this program reads {VERSION}: update it"
        )
    return Parcel(place, first, count, segment, value) if number == place and count else None


def fence() -> bytes:
    """Return a parcel that counts nowhere: whoever sees it stored knows that all before it is decided."""
    return HEAD.pack(MARK, 0, NOWHERE, 0, 0)


class Packer:
    """Gathers log records for one commit."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._pieces: list[list[bytes]] = []
        self._counts: list[int] = []
        self._bytes = 0
        self.bytes = 0

    def add(self, kind: int, received_at: int, payload: bytes) -> None:
        """Take a record; raises StorageError: too large."""
        size = len(payload)
        if size > MOST_PAYLOAD:
            raise StorageError(f"record of {size} bytes, at most {MOST_PAYLOAD} fit")
        if not self._pieces or self._bytes + size > PARCEL_BYTES:
            self._pieces.append([])
            self._counts.append(0)
            self._bytes = 0
        self._pieces[-1] += (ENTRY.pack(size, received_at, kind), payload)
        self._counts[-1] += 1
        self._bytes += size
        self.bytes += size

    def values(self, place: int, first: int, segment: int) -> list[bytes]:
        """Return what to store from a Kafka offset on; `first`: the log offset of the first record."""
        found: list[bytes] = []
        for pieces, count in zip(self._pieces, self._counts, strict=True):
            found.append(b"".join((HEAD.pack(MARK, count, place + len(found), first, segment), *pieces)))
            first += count
        return found
