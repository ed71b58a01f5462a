"""The spool: what the sensors said, on disk, until the platform's log has it.

A lane is a folder of segments (`citybrain.segments`) whose record offset is the message's `seq` and whose payload is
its body; a body never changes, so a repeat on the wire has the checksum of the first sending. `meta.json` binds the
numbering (`epoch`) to the board's serial: on another board, or where synced records are gone, a new epoch begins and
what is unsent keeps its seqs.

The lowest unacknowledged seq (`floor`) is only marked, never synced: after a power loss it may be lower, and ingest
answers the repeats; it is never above a message that was neither acknowledged nor evicted.
"""

from __future__ import annotations

import random
import secrets
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import msgspec

from citybrain.counters import Counters
from citybrain.errors import DiskFull
from citybrain.model import Lane, Reading
from citybrain.segments import FRAME, HEADER, MAX_RECORD, OVERHEAD, Record, Writer, scan, segment_name, segments
from citybrain.storage import OS_FILES, Files
from citybrain.wire import HEAD, MAX_MESSAGE, MAX_SEQ, WINDOW_BYTES, columns_body, crc32c

LIMIT_BYTES = 512 * 1024 * 1024  # 7 days of 1,000 devices at one reading a minute are about 300 MB
SEGMENT_BYTES = 1024 * 1024  # what a drain holds in memory, and what an eviction loses at once
RECENT_BYTES = 2 * WINDOW_BYTES
MAX_BODY = MAX_MESSAGE - HEAD.size - 2048  # zstd adds at most 1/256 to what it cannot compress
MESSAGE = 1  # the records' kind


class Meta(msgspec.Struct, frozen=True):
    """What `meta.json` holds: the board this spool was written on, its epoch, and its latest connection."""

    serial: str
    epoch: int
    connection: int = 0
    v: int = 1


def random_epoch() -> int:
    """Return an epoch that nobody has had: 1 .. 2**53 - 1."""
    return secrets.randbelow(MAX_SEQ) + 1


def seeded_epochs(seed: str) -> Callable[[], int]:
    """Return a source of epochs that depends on the seed alone; for simulations that must repeat bit for bit."""
    source = random.Random(seed)
    return lambda: source.randint(1, MAX_SEQ)


class _Pending(msgspec.Struct, frozen=True):
    at_ms: int
    body: bytes
    readings: int


class _Store:
    """One lane's segments. Only synced records are ever handed out."""

    def __init__(self, folder: Path, files: Files, segment_bytes: int) -> None:
        self.folder = folder
        self.files = files
        self.writer = Writer(folder, files, segment_bytes)
        self.floor = 1
        self._mark = folder / "floor"
        self.firsts: list[int] = []  # the segments on disk, by their first seq
        self.pending: list[_Pending] = []  # appended, not yet committed
        self._recent: dict[int, bytes] = {}
        self._recent_bytes = 0
        self._loaded: dict[int, bytes] = {}  # one segment, read back
        self._loaded_first = -1
        self._loaded_end = 0
        self._loaded_until = 0

    @property
    def committed(self) -> int:
        return self.writer.committed

    def start(self) -> bool:
        """Recover; return whether records that had been synced are gone."""
        marked = self.files.marked(self.folder / "committed")
        empty = not segments(self.files, self.folder)
        self.writer.start(1)
        self.firsts = segments(self.files, self.folder)
        gone = empty or self.committed < marked
        self.floor = min(max(self.files.marked(self._mark), self.firsts[0], 1), self.committed)
        self.files.mark(self._mark, self.floor)
        return gone

    def append(self, message: _Pending) -> int:
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
            self._forget(next(iter(self._recent)))

    def _forget(self, seq: int) -> None:
        self._recent_bytes -= len(self._recent.pop(seq))

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

    def question(self) -> int:
        """Return the lowest readable seq that is not acknowledged; else the highest, else the first to be given."""
        seq = self.following(self.floor)
        return seq if seq < self.committed else self.latest() or self.committed

    def latest(self) -> int:
        """Return the highest seq whose message is readable, also if acknowledged; 0 where there is none."""
        for index in reversed(range(len(self.firsts))):
            self._load(index)
            if self._loaded:
                return max(self._loaded)
        return 0

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
        data = self.files.read(path, self._loaded_end)
        records = whole_records(data, first, until)
        self._loaded.update((record.offset, record.payload) for record in records)
        self._loaded_end += len(data)
        self._loaded_until = until

    def raise_floor(self, floor: int) -> int:
        """Free what is below `floor`, which must not exceed what is committed; return the bytes freed on disk."""
        self.floor = max(self.floor, floor)
        self.files.mark(self._mark, self.floor)
        for seq in list(takewhile(lambda seq: seq < self.floor, self._recent)):
            self._forget(seq)
        before, freed = len(self.firsts), 0
        while len(self.firsts) > 1 and self.firsts[1] <= self.floor:
            path = self.folder / segment_name(self.firsts.pop(0))
            freed += self.files.size(path)
            self.files.remove(path.with_suffix(".damaged"))
        if len(self.firsts) < before:
            self.writer.drop_before(self.floor)
        return freed

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
        return sum(self.files.size(self.folder / segment_name(first)) for first in self.firsts)


class Spool:
    """A gateway's messages by lane. Call `start` first; nothing is safe, or readable, before `commit` returned.

    `limit_bytes` bounds the segments of all lanes together: beyond it, and on a full disk, the oldest segments go,
    telemetry before event, counted as `lost_total{reason=evicted}`. Not so where `evicts` is false, because whoever
    gave us readings was told that they are safe: then nothing goes, and he must ask `full` before he takes more.
    """

    def __init__(
        self,
        folder: Path,
        serial: str,
        files: Files = OS_FILES,
        limit_bytes: int = LIMIT_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        *,
        counters: Counters | None = None,
        draw_epoch: Callable[[], int] = random_epoch,
        evicts: bool = True,
    ) -> None:
        self.folder = folder
        self.serial = serial
        self.limit_bytes = limit_bytes
        self.counters = counters if counters is not None else Counters("gateway")
        self.epoch = 0
        self.connection = 0
        self.asks = dict.fromkeys(Lane, 0)  # what to ask ingest with in an earlier process's epoch; see gateway.uplink
        self.resumed = dict.fromkeys(Lane, 0)  # highest seq that an earlier process may have sent in this epoch
        self._files = files
        self._draw_epoch = draw_epoch
        self._evicts = evicts
        self._bytes = 0
        part = min(segment_bytes, max(limit_bytes // 8, 1))  # so that evicting one never empties the spool
        self._stores = {lane: _Store(folder / lane.topic, files, part) for lane in Lane}

    # --- life ---

    def start(self) -> None:
        """Recover both lanes and the numbering; raises StorageError. `counters.warnings` says what was not whole."""
        self._files.make(self.folder)
        gone = [store.folder.name for store in self._stores.values() if store.start()]
        for store in self._stores.values():
            for text in store.writer.warnings:
                self.counters.warn(text)
                self.counters.add("errors_total", stage="recovery")
        self._bytes = sum(store.bytes_on_disk() for store in self._stores.values())
        meta = self._read_meta()
        if meta is None:
            self.new_epoch("no_meta")
            return
        self.epoch, self.connection = meta.epoch, meta.connection
        if meta.serial != self.serial:
            self.new_epoch("other_board")
        elif gone:
            self.new_epoch("records_gone")
        else:
            self.resumed = {lane: store.committed - 1 for lane, store in self._stores.items()}
            self.asks = {lane: store.question() for lane, store in self._stores.items()}

    def _read_meta(self) -> Meta | None:
        path = self.folder / "meta.json"
        if path.name not in self._files.names(self.folder):
            return None
        try:
            meta = msgspec.json.decode(self._files.read(path), type=Meta)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.counters.warn(f"{path}: {error}; a new epoch begins")
            return None
        return meta if 0 < meta.epoch <= MAX_SEQ else None

    def _write_meta(self) -> None:
        content = msgspec.json.encode(Meta(self.serial, self.epoch, self.connection))
        self._files.replace(self.folder / "meta.json", content)

    def new_epoch(self, reason: str = "restored") -> None:
        """Begin a new numbering, durably: what is unsent keeps its seqs, and ingest starts at its floor."""
        before = self.epoch
        while self.epoch == before:
            self.epoch = self._draw_epoch()
        self.resumed, self.asks = dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0)
        self.counters.add("epochs_total", reason=reason)
        while True:
            try:
                return self._write_meta()
            except DiskFull:
                if not self._evict():
                    raise

    def next_connection(self, now_s: int) -> int:
        """Return a number above every earlier connection's, durably; raises StorageError.

        It follows the clock where that is ahead, so that a restored card does not count below what it once said. On a
        full disk it is not kept: no reading is worth less, and a gateway that cannot connect could not empty its spool.
        """
        self.connection = max(self.connection + 1, now_s)
        try:
            self._write_meta()
        except DiskFull as error:
            self.counters.add("errors_total", stage="disk_full")
            self.counters.warn(str(error))
        return self.connection

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        for store in self._stores.values():
            store.writer.close()

    # --- in ---

    def append(self, lane: Lane, readings: Sequence[Reading], at_ms: int) -> int:
        """Number readings as one message, or as several where one would be too large; return the last seq.

        Readings that no frame can hold are counted as dropped, with a warning. Nothing is kept before `commit`.
        """
        store = self._stores[lane]
        if readings:
            try:
                body = columns_body(readings)
            except (ValueError, OverflowError, struct.error) as error:
                self._split(lane, readings, at_ms, "unencodable", str(error))
            else:
                if len(body) <= MAX_BODY:
                    store.append(_Pending(at_ms, body, len(readings)))
                else:
                    self._split(lane, readings, at_ms, "oversized", f"{len(body)} bytes, at most {MAX_BODY} fit")
        return store.writer.next_offset - 1

    def append_body(self, lane: Lane, body: bytes, readings: int, at_ms: int) -> int:
        """Number a columns body that is already packed as one message; return its seq. Raises ValueError: too large."""
        if len(body) > MAX_BODY:
            raise ValueError(f"a body of {len(body)} bytes, at most {MAX_BODY} fit in a message")
        store = self._stores[lane]
        store.append(_Pending(at_ms, body, readings))
        return store.writer.next_offset - 1

    def _split(self, lane: Lane, readings: Sequence[Reading], at_ms: int, reason: str, what: str) -> None:
        if len(readings) == 1:
            self.counters.drop(reason)
            self.counters.warn(f"reading of {readings[0].device[:80]!r} at {readings[0].observed_at}: {what}")
            return
        half = len(readings) // 2
        self.append(lane, readings[:half], at_ms)
        self.append(lane, readings[half:], at_ms)

    def commit(self) -> None:
        """Sync what was appended. A full disk evicts; raises DiskFull where that does not help: it is dropped, counted.

        Any other StorageError means that the process must end.
        """
        failed: DiskFull | None = None
        for lane in (Lane.EVENT, Lane.TELEMETRY):
            try:
                self._commit(self._stores[lane])
            except DiskFull as error:
                failed = error
        while self._bytes > self.limit_bytes and self._evict():
            pass
        if failed is not None:
            raise failed

    def _commit(self, store: _Store) -> None:
        while True:
            try:
                self._bytes += store.commit()
            except DiskFull:
                if not self._evict():
                    self.counters.drop("disk_full", store.give_up())
                    raise
                store.again()
            else:
                return

    def _evict(self) -> bool:
        """Drop the oldest segment, of telemetry as long as there is one; return whether there was any."""
        if not self._evicts:
            return False
        for lane in (Lane.TELEMETRY, Lane.EVENT):
            store = self._stores[lane]
            try:
                end = store.oldest_end()
            except DiskFull:  # not even an empty file fits
                continue
            if end:
                self.counters.add("lost_total", max(end - store.floor, 0), reason="evicted")
                self._bytes -= store.raise_floor(end)
                return True
        return False

    # --- out ---

    def floor(self, lane: Lane) -> int:
        """Return the lowest seq still spooled; `next_seq` where all is acknowledged or evicted."""
        return self._stores[lane].floor

    def next_seq(self, lane: Lane) -> int:
        """Return the seq behind the last committed message."""
        return self._stores[lane].committed

    @property
    def full(self) -> bool:
        """Whether the segments hold more than `limit_bytes`."""
        return self._bytes > self.limit_bytes

    def spooled(self) -> int:
        """Return how many messages wait for their acknowledgement."""
        return sum(store.committed - store.floor for store in self._stores.values())

    def body(self, lane: Lane, seq: int) -> bytes | None:
        """Return a committed message's body, also one already acknowledged whose segment is still there."""
        return self._stores[lane].body(seq)

    def earliest(self, lane: Lane, most: int) -> int:
        """Return the lowest readable seq that is not acknowledged, if it is at most `most`; else 0."""
        store = self._stores[lane]
        seq = store.following(store.floor)
        return seq if seq <= most and seq < store.committed else 0

    def read(self, lane: Lane, seq: int, most_messages: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """Return committed messages (seq, body) from `seq` or the floor on, without a gap between them.

        A gap (a damaged segment) ends the list. Once everything before it is acknowledged, it is counted as
        `lost_total{reason=damaged}` and the floor steps over it, which tells ingest that nothing will come.
        """
        store = self._stores[lane]
        if seq <= store.floor:
            seq = self._over_gap(store)
        messages: list[tuple[int, bytes]] = []
        while len(messages) < most_messages and (body := store.body(seq)) is not None:
            most_bytes -= len(body)
            if most_bytes < 0:
                break
            messages.append((seq, body))
            seq += 1
        return messages

    def _over_gap(self, store: _Store) -> int:
        there = store.following(store.floor)
        if there > store.floor:
            missing = there - store.floor
            self.counters.add("lost_total", missing, reason="damaged")
            self.counters.warn(f"{store.folder}: messages {store.floor}..{there - 1} cannot be read any more")
            self._bytes -= store.raise_floor(there)
        return store.floor

    def acknowledged(self, lane: Lane, seq: int) -> None:
        """Free the lane's messages up to and including `seq`: they are in the log."""
        store = self._stores[lane]
        if store.floor <= seq < store.committed:
            self._bytes -= store.raise_floor(seq + 1)


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
