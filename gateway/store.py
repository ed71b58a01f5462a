"""One lane of the spool on disk: segments whose record offset is the message's `seq` and whose payload is its body.

`gateway.spool` has the lanes together: numbering, limits, what goes first.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import msgspec

from citybrain.counters import Counters
from citybrain.errors import DiskFull, StorageError
from citybrain.segments import FRAME, HEADER, MAX_RECORD, OVERHEAD, Record, Writer, scan, segment_name, segments
from citybrain.storage import Files
from citybrain.wire import WINDOW_BYTES, crc32c

RECENT_BYTES = 2 * WINDOW_BYTES
MESSAGE = 1  # the records' kind


class Pending(msgspec.Struct, frozen=True):
    """A message that is appended and not committed. readings: how many it holds, for what must be given up."""

    at_ms: int
    body: bytes
    readings: int


class Store:
    """One lane's segments. Only synced records are ever handed out."""

    def __init__(self, folder: Path, files: Files, segment_bytes: int, counters: Counters) -> None:
        self.folder = folder
        self.files = files
        self._counters = counters
        self.writer = Writer(folder, files, segment_bytes)
        self.floor = 1
        self._mark = folder / "floor"
        self.firsts: list[int] = []  # the segments on disk, by their first seq
        self.pending: list[Pending] = []  # appended, not yet committed
        self._recent: OrderedDict[int, bytes] = OrderedDict()  # a dict is slow to lose its first
        self._recent_bytes = 0
        self._loaded: dict[int, bytes] = {}  # one segment, read back
        self._loaded_first = -1
        self._loaded_end = 0
        self._loaded_until = 0
        self._newest_ms: int | None = None  # of what is committed; None: not looked at yet
        self._begins: dict[int, int] = {}  # when the first record of a segment was spooled

    @property
    def committed(self) -> int:
        """The seq behind the last message that is synced."""
        return self.writer.committed

    def start(self) -> bool:
        """Recover; return whether records that had been synced are gone. Raises StorageError."""
        marked = self.files.marked(self.folder / "committed")
        empty = not segments(self.files, self.folder)
        self.writer.start(1)
        self.firsts = segments(self.files, self.folder)
        gone = empty or self.committed < marked
        self.floor = min(max(self.files.marked(self._mark), self.firsts[0], 1), self.committed)
        self._mark_floor()
        return gone

    def _mark_floor(self) -> None:
        with contextlib.suppress(DiskFull):  # on a card that copies what it overwrites; the mark may be too low
            self.files.mark(self._mark, self.floor)

    def append(self, message: Pending) -> int:
        """Hand a message to the writer and return its seq."""
        self.pending.append(message)
        return self.writer.append(MESSAGE, message.at_ms, message.body)

    def commit(self) -> int:
        """Sync what is pending, return its bytes; after a DiskFull `again` or `give_up` must follow."""
        first = self.committed
        self.writer.commit()
        if self.writer.segment != self.firsts[-1]:
            self.firsts.append(self.writer.segment)
        written = 0
        for seq, message in enumerate(self.pending, first):
            self._remember(seq, message.body)
            written += OVERHEAD + len(message.body)
            self._newest_ms = message.at_ms
        self.pending.clear()
        return written

    def again(self) -> None:
        """Hand what is pending to the writer once more: a full disk made it forget."""
        for message in self.pending:
            self.writer.append(MESSAGE, message.at_ms, message.body)

    def give_up(self) -> int:
        """Forget what is pending, return how many readings that were."""
        readings = sum(message.readings for message in self.pending)
        self.pending.clear()
        return readings

    def _remember(self, seq: int, body: bytes) -> None:
        self._recent[seq] = body
        self._recent_bytes += len(body)
        while self._recent_bytes > RECENT_BYTES:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    def body(self, seq: int) -> bytes | None:
        """Return a committed message's body, or None where there is none (any more)."""
        found = self._recent.get(seq)
        if found is not None or not self.firsts[0] <= seq < self.committed:
            return found
        self._load(bisect_right(self.firsts, seq) - 1)
        return self._loaded.get(seq)

    def following(self, seq: int) -> int:
        """Return the lowest seq at or above `seq` whose message is readable; the next one to be given where none is."""
        while seq < self.committed and self.body(seq) is None:
            in_segment = [there for there in self._loaded if there > seq]
            behind = bisect_right(self.firsts, seq)
            beyond = self.firsts[behind] if behind < len(self.firsts) else self.committed
            seq = min(in_segment, default=beyond)
        return seq

    def _load(self, index: int) -> None:
        first = self.firsts[index]
        until = self.firsts[index + 1] if index + 1 < len(self.firsts) else self.committed
        if first != self._loaded_first:
            self._loaded, self._loaded_first, self._loaded_end, self._loaded_until = {}, first, 0, 0
        if self._loaded_until == until:
            return
        path = self.folder / segment_name(first)
        damaged = path.with_suffix(".damaged")  # set aside by recovery: what is whole in it still counts
        if damaged.name in self.files.names(self.folder):
            path = damaged
        try:
            data = self.files.read(path, self._loaded_end)
        except StorageError as error:  # one bad block must not keep everything behind it from being sent
            self._counters.warn(f"{error}; what cannot be read there is given up")
            self._counters.add("errors_total", stage="read")
            data = b""
        records = whole_records(data, first, until)
        self._loaded.update((record.offset, record.payload) for record in records)
        self._loaded_end += len(data)
        self._loaded_until = until

    def raise_floor(self, floor: int) -> int:
        """Free what is below `floor`, which must not exceed what is committed; return the bytes freed on disk."""
        self.floor = max(self.floor, floor)
        self._mark_floor()
        while self._recent and next(iter(self._recent)) < self.floor:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])
        before, freed = len(self.firsts), 0
        while len(self.firsts) > 1 and self.firsts[1] <= self.floor:
            first = self.firsts.pop(0)
            self._begins.pop(first, None)
            path = self.folder / segment_name(first)
            freed += self.files.size(path)
            self.files.remove(path.with_suffix(".damaged"))
        if len(self.firsts) < before:
            self.writer.drop_before(self.floor)
        return freed

    def aged(self, before_ms: int, since_ms: int) -> int:
        """Return the seq behind the oldest segment if all of it was spooled in [since, before); 0 otherwise.

        The first record of the next segment tells that, so that nothing but its header is read.
        """
        if self.floor >= self.committed:
            return 0
        newest = self._begun(self.firsts[1]) if len(self.firsts) > 1 else None
        newest = self._latest_ms() if newest is None else newest
        return self.oldest_end() if since_ms <= newest < before_ms else 0

    def _begun(self, first: int) -> int | None:
        """Return when a segment's first record was spooled; None where it has none."""
        if first not in self._begins:
            head = self.files.read(self.folder / segment_name(first), 0, OVERHEAD)
            if len(head) < OVERHEAD:
                return None
            self._begins[first] = int(HEADER.unpack_from(head, FRAME.size)[1])
        return self._begins[first]

    def _latest_ms(self) -> int:
        """Return when the last committed message was spooled; 0 where there is none to tell."""
        for first in reversed(self.firsts if self._newest_ms is None else ()):
            records = whole_records(self.files.read(self.folder / segment_name(first)), first, self.committed)
            if records:
                self._newest_ms = records[-1].received_at
                break
        return self._newest_ms or 0

    def oldest_end(self) -> int:
        """Return the seq behind the oldest segment, closing it where it is still written to; 0 where all is empty."""
        if len(self.firsts) == 1:
            if self.firsts[0] == self.committed:
                return 0
            self.writer.roll()
            if self.writer.segment == self.firsts[0]:
                return 0
            self.firsts.append(self.writer.segment)
        return self.firsts[1]

    def bytes_on_disk(self) -> int:
        """Return how much the lane's segments hold."""
        return sum(self.files.size(self.folder / segment_name(first)) for first in self.firsts)


def whole_records(data: bytes, least: int, below: int) -> list[Record]:
    """Return every whole record with `least <= offset < below`, in order, stepping over whatever lies between them."""
    records: list[Record] = []
    position = 0
    while position < len(data):
        found = scan(data, None, position)
        records += [record for record in found.records if least <= record.offset < below]
        if not found.fault:
            break
        least = records[-1].offset + 1 if records else least
        position = _next_whole(data, found.end + 1, least)
    return records


def _next_whole(data: bytes, position: int, least: int) -> int:
    while position <= len(data) - OVERHEAD:
        length, crc = FRAME.unpack_from(data, position)
        if HEADER.size <= length <= min(MAX_RECORD, len(data) - position - FRAME.size):
            inner = data[position + FRAME.size : position + FRAME.size + length]
            if HEADER.unpack_from(inner)[0] >= least and crc32c(inner) == crc:
                return position
        position += 1
    return len(data)
