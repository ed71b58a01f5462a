"""The spool: what the sensors said, on disk, until the platform's log has it.

A lane is a folder of segments (`citybrain.segments`) whose record offset is the message's `seq` and whose payload is
its body; a body never changes, so a repeat on the wire has the checksum of the first sending. `meta.json` binds the
numbering (`epoch`) to the board's serial: on another board, or where synced records are gone, a new epoch begins and
what is unsent keeps its seqs.

The lowest unacknowledged seq (`floor`) is only marked, never synced: after a power loss it may be lower, and ingest
answers the repeats; it is never above a message that was neither acknowledged nor evicted. It is never below what its
epoch began with, which is synced: ingest knows nothing of an earlier epoch's messages under this one's numbers.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS
from citybrain.counters import Counters
from citybrain.errors import DiskFull, StorageError
from citybrain.model import READING_LANES, Lane, Reading
from citybrain.storage import OS_FILES, Files
from citybrain.wire import HEAD, MAX_MESSAGE, MAX_SEQ, blob_chunks, blob_sha256, columns_body
from gateway.store import Pending, Store

LIMIT_BYTES = 512 * 1024 * 1024  # 7 days of 1,000 devices at one reading a minute are about 300 MB
SEGMENT_BYTES = 1024 * 1024  # what a drain holds in memory, and what an eviction loses at once
AGE_MS = 30 * DAY_MS
CLOCK_SET_MS = 1_577_836_800_000  # 2020: what was spooled before is of a gateway that did not know the time
COMMITS = (Lane.EVENT, Lane.TELEMETRY, Lane.BLOB)  # in this order: what matters most first
LANE_NAMES = tuple(lane.topic for lane in Lane)
MOST_FAULT = 300  # letters
EVICTS = (Lane.BLOB, Lane.TELEMETRY, Lane.EVENT)
MAX_BODY = MAX_MESSAGE - HEAD.size - 2048  # zstd adds at most 1/256 to what it cannot compress


class Meta(msgspec.Struct, frozen=True):
    """What `meta.json` holds: the board this spool was written on, its epoch, its latest connection, its lanes.

    A lane that it does not name is new: nothing of it can be gone. begins: the floors the epoch began with.
    """

    serial: str
    epoch: int
    connection: int = 0
    lanes: tuple[str, ...] = tuple(lane.topic for lane in READING_LANES)
    begins: dict[str, int] = {}
    v: int = 1


def random_epoch() -> int:
    """Return an epoch that nobody has had: 1 .. 2**53 - 1."""
    return secrets.randbelow(MAX_SEQ) + 1


def seeded_epochs(seed: str) -> Callable[[], int]:
    """Return a source of epochs that depends on the seed alone; for simulations that must repeat bit for bit."""
    source = random.Random(seed)
    return lambda: source.randint(1, MAX_SEQ)


class Spool:
    """A gateway's messages by lane. Call `start` first; nothing is safe, or readable, before `commit` returned.

    `limit_bytes` bounds the segments of all lanes together: beyond it, and on a full disk, the oldest segments go,
    blob before telemetry before event, counted as `lost_total{reason=evicted}`; what is older than `age_ms` goes at
    `expire`, `lost_total{reason=aged}`; both as `evicted_total{lane}`. Nothing is evicted where `evicts` is false,
    because whoever gave us readings was told that they are safe: he must ask `full` before he takes more.
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
        age_ms: int = AGE_MS,
    ) -> None:
        self.folder = folder
        self.serial = serial
        self.limit_bytes = limit_bytes
        self.counters = counters if counters is not None else Counters("gateway")
        self.epoch = 0
        self.connection = 0
        self.fault = ""  # what was found damaged at the start; the gateway's status says it
        self.continues = False  # whether an earlier process began this epoch
        self.resumed = dict.fromkeys(Lane, 0)  # highest seq that an earlier process may have sent in this epoch
        self._files = files
        self._draw_epoch = draw_epoch
        self._evicts = evicts
        self._age_ms = age_ms
        self._bytes = 0
        self._begins: dict[str, int] = {}
        part = min(segment_bytes, max(limit_bytes // 8, 1))  # so that evicting one never empties the spool
        self._stores = {lane: Store(folder / lane.topic, files, part, self.counters) for lane in Lane}

    # --- life ---

    def start(self) -> None:
        """Recover all lanes and the numbering. `counters.warnings` and `fault` say what was not whole.

        A lane that cannot be recovered is set aside whole, and a new epoch begins. Raises StorageError where the disk
        cannot be written at all: read-only, or full of what is not ours.
        """
        self._files.make(self.folder)
        gone = [lane.topic for lane in self._stores if self._recover(lane)]
        self._bytes = sum(store.bytes_on_disk() for store in self._stores.values())
        meta = self._read_meta()
        if meta is None:
            self.new_epoch("no_meta")
            return
        self.epoch, self.connection, self._begins = meta.epoch, meta.connection, meta.begins
        if meta.serial != self.serial:
            self.new_epoch("other_board")
        elif not set(gone).isdisjoint(meta.lanes):
            self.new_epoch("records_gone")
        else:
            self._continue()

    def _continue(self) -> None:
        """Go on with the epoch of an earlier process."""
        self.continues = True
        for lane, store in self._stores.items():
            self.resumed[lane] = store.committed - 1
            self._bytes -= store.raise_floor(min(self._begins.get(lane.topic, 1), store.committed))

    def _recover(self, lane: Lane) -> bool:
        """Recover a lane; return whether anything of it that had been synced is gone."""
        store = self._stores[lane]
        try:
            gone = store.start()
        except DiskFull:
            raise
        except StorageError as error:
            aside = self._set_aside(store)
            self._found(f"{error}; the whole lane is kept as {aside}, and it begins anew")
            gone = store.start() or True
        for text in store.writer.warnings:
            self._found(text)
        return gone

    def _set_aside(self, store: Store) -> Path:
        """Move a lane's folder out of the way; raises StorageError where the disk is read-only."""
        aside = store.folder.with_name(f"{store.folder.name}.damaged-{secrets.token_hex(4)}")
        self._files.rename(store.folder, aside)
        return aside

    def _found(self, text: str) -> None:
        self.fault = (f"{self.fault}; {text}" if self.fault else text)[:MOST_FAULT]
        self.counters.warn(text)
        self.counters.add("errors_total", stage="recovery")

    def _read_meta(self) -> Meta | None:
        path = self.folder / "meta.json"
        if path.name not in self._files.names(self.folder):
            return None
        try:
            meta = msgspec.json.decode(self._files.read(path), type=Meta)
        except (StorageError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._found(f"{path}: {error}; a new epoch begins")
            return None
        return meta if 0 < meta.epoch <= MAX_SEQ else None

    def _write_meta(self) -> None:
        content = msgspec.json.encode(Meta(self.serial, self.epoch, self.connection, LANE_NAMES, self._begins))
        self._files.replace(self.folder / "meta.json", content)

    def new_epoch(self, reason: str = "restored") -> None:
        """Begin a new numbering, durably: what is unsent keeps its seqs, and ingest starts at its floor.

        Raises DiskFull, with the old numbering still in force, where evicting does not help.
        """
        before, self.epoch = (self.epoch, self._begins), self._other_epoch()
        while True:
            self._begins = {lane.topic: store.floor for lane, store in self._stores.items()}
            try:
                self._write_meta()
                break
            except DiskFull:
                if not self._evict():
                    self.epoch, self._begins = before
                    raise
        self.continues, self.resumed = False, dict.fromkeys(Lane, 0)
        self.counters.add("epochs_total", reason=reason)

    def _other_epoch(self) -> int:
        while (epoch := self._draw_epoch()) == self.epoch:
            pass
        return epoch

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
                    store.append(Pending(at_ms, body, len(readings)))
                else:
                    self._split(lane, readings, at_ms, "oversized", f"{len(body)} bytes, at most {MAX_BODY} fit")
        return store.writer.next_offset - 1

    def append_body(self, lane: Lane, body: bytes, readings: int, at_ms: int) -> int:
        """Number a columns body that is already packed as one message; return its seq. Raises ValueError: too large."""
        if len(body) > MAX_BODY:
            raise ValueError(f"a body of {len(body)} bytes, at most {MAX_BODY} fit in a message")
        store = self._stores[lane]
        store.append(Pending(at_ms, body, readings))
        return store.writer.next_offset - 1

    def put_blob(self, content: bytes, at_ms: int, *, unmasked: bool = False) -> str:
        """Number evidence (1 byte .. 1 MiB) as messages of the blob lane; return its SHA-256 in hex.

        unmasked: persons may be recognised in it. Raises ValueError, with nothing taken: it is empty, or too large.
        """
        for body in blob_chunks(content, unmasked=unmasked):
            self._stores[Lane.BLOB].append(Pending(at_ms, body, 1))
        return blob_sha256(content)

    def _split(self, lane: Lane, readings: Sequence[Reading], at_ms: int, reason: str, what: str) -> None:
        if len(readings) == 1:
            self.counters.drop(reason)
            self.counters.warn(f"reading of {readings[0].device[:80]!r} at {readings[0].observed_at}: {what}")
            return
        half = len(readings) // 2
        self.append(lane, readings[:half], at_ms)
        self.append(lane, readings[half:], at_ms)

    def commit(self, *lanes: Lane) -> None:
        """Sync what was appended, to all lanes or to these. A full disk evicts.

        Raises DiskFull where that does not help: what was appended is dropped, and counted. Any other StorageError
        means that the process must end.
        """
        failed: DiskFull | None = None
        for lane in COMMITS:
            if lanes and lane not in lanes:
                continue
            try:
                self._commit(self._stores[lane])
            except DiskFull as error:
                failed = error
        while self._bytes > self.limit_bytes and self._evict():
            pass
        if failed is not None:
            raise failed

    def _commit(self, store: Store) -> None:
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
        """Drop the oldest segment of the first lane in `EVICTS` that has one; return whether there was any.

        Before anything is lost all goes that is acknowledged and stayed for its numbers alone.
        """
        if not self._evicts:
            return False
        for lane in sorted(EVICTS, key=lambda lane: self._stores[lane].floor < self._stores[lane].committed):
            store = self._stores[lane]
            try:
                end = store.oldest_end()
            except DiskFull:  # not even an empty file fits
                continue
            if end:
                self._give_up(lane, end, "evicted")
                return True
        return False

    def _give_up(self, lane: Lane, end: int, reason: str) -> None:
        store = self._stores[lane]
        lost = max(end - store.floor, 0)
        self.counters.add("lost_total", lost, reason=reason)
        self.counters.add("evicted_total", lost, lane=lane.topic)
        self._bytes -= store.raise_floor(end)

    def expire(self, now_ms: int) -> None:
        """Give up segments of which everything is older than `age_ms`; call it with a clock that is to be trusted.

        What was spooled before the clock was set has no age. Raises StorageError.
        """
        with contextlib.suppress(DiskFull):  # no room for the empty file behind a lane's only one: later, then
            for lane, store in self._stores.items():
                while end := store.aged(now_ms - self._age_ms, CLOCK_SET_MS):
                    self._give_up(lane, end, "aged")

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
        """Return the lowest seq not acknowledged whose message is readable, if it is at most `most`; else 0."""
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

    def _over_gap(self, store: Store) -> int:
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
