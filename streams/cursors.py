"""Cursors: what ingest expects next of every (gateway, lane, epoch), and what it took lately.

Only `seq == expected` is taken (docs/wire.md). A change counts from the next `settle` on; `revert` takes it back, for a
disk that was full. `save` is a snapshot of them all, so that recovery need not read the whole log.
"""

from __future__ import annotations

import enum

import msgspec

from citybrain.errors import Damaged
from citybrain.wire import Header

RECENT = 64  # checksums remembered per epoch: twice the window, so any repeat a gateway can send is compared
EPOCHS = 8  # of one lane: a cloned card alternates between two, a board that is exchanged often leaves a few behind
VERSION = 1
Lanes = dict[int, "Cursor"]  # epoch -> cursor


class Verdict(enum.Enum):
    """What a message is, by its number."""

    NEXT = "next"
    REPEATED = "repeated"
    GAP = "gap"
    CONFLICT = "conflict"
    ASKED = "asked"


class Cursor(msgspec.Struct):
    """One epoch of one lane: everything below `expected` is taken. `recent` maps seq to checksum."""

    expected: int
    used_ms: int
    recent: dict[int, int] = {}
    settled: int = 0  # `expected` as of the last commit

    def judge(self, header: Header, checksum: int) -> Verdict:
        """Return what a message with this header is; call `skip_to` with its floor first."""
        if header.asks:
            return Verdict.ASKED
        if header.seq == self.expected:
            return Verdict.NEXT
        if header.seq > self.expected:
            return Verdict.GAP
        return Verdict.CONFLICT if self.recent.get(header.seq, checksum) != checksum else Verdict.REPEATED

    def skip_to(self, floor: int) -> int:
        """Skip what was evicted at the edge; return how many messages that were."""
        lost = max(0, floor - self.expected)
        self.expected += lost
        return lost

    def take(self, seq: int, checksum: int, now_ms: int) -> None:
        """Note that `seq` has been taken."""
        self.expected, self.used_ms = seq + 1, now_ms
        self.recent[seq] = checksum
        self.recent.pop(seq - RECENT, None)


class SavedCursor(msgspec.Struct, frozen=True):
    """A cursor as it stands in a snapshot; `recent` as (seq, checksum) pairs."""

    gateway: str
    lane: int
    epoch: int
    expected: int
    used_ms: int
    recent: list[tuple[int, int]]


class Saved(msgspec.Struct, frozen=True):
    """A snapshot: the content of a `cursors` control record. Names of blobs are content hashes.

    `adopted` says how far each device's quarantined readings are replayed; `previous` names older snapshots still kept.
    """

    registry: str
    ruleset: str
    cursors: list[SavedCursor]
    faulted: list[tuple[str, int]]
    adopted: dict[str, int]
    previous: list[str]
    version: int = VERSION


class Cursors:
    """A shard's cursors. `faulted` holds the (gateway, epoch) pairs whose conflict has been reported."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, int], Lanes] = {}
        self.faulted: set[tuple[str, int]] = set()
        self._touched: dict[int, Cursor] = {}
        self._new_faults: set[tuple[str, int]] = set()

    def lane(self, gateway: str, lane: int) -> Lanes:
        """Return a lane's cursors by epoch; the mapping stays the same object."""
        return self.lanes.setdefault((gateway, lane), {})

    def begin(self, lanes: Lanes, epoch: int, floor: int, now_ms: int) -> Cursor:
        """Begin an unknown epoch at its floor; the one that was used longest ago gives way to the ninth."""
        if len(lanes) >= EPOCHS:
            del lanes[min(lanes, key=lambda known: lanes[known].used_ms)]
        cursor = lanes[epoch] = Cursor(floor, now_ms, {}, floor)
        return cursor

    def touch(self, cursor: Cursor) -> None:
        """Note that this cursor may move before the next `settle` or `revert`."""
        self._touched[id(cursor)] = cursor

    def fault(self, gateway: str, epoch: int) -> bool:
        """Note a conflict; return whether it is this epoch's first."""
        new = (gateway, epoch) not in self.faulted
        if new:
            self.faulted.add((gateway, epoch))
            self._new_faults.add((gateway, epoch))
        return new

    def settle(self) -> None:
        """What was taken is durable."""
        for cursor in self._touched.values():
            cursor.settled = cursor.expected
        self._touched.clear()
        self._new_faults.clear()

    def revert(self) -> None:
        """What was taken since the last `settle` is not in the log."""
        for cursor in self._touched.values():
            cursor.expected = cursor.settled
            cursor.recent = {seq: checksum for seq, checksum in cursor.recent.items() if seq < cursor.settled}
        self._touched.clear()
        self.faulted -= self._new_faults
        self._new_faults.clear()

    def taken(self, gateway: str, lane: int, epoch: int, seq: int) -> bool:
        """Return whether a message has been taken; of an epoch that is long forgotten, that is taken for granted."""
        cursor = self.lanes.get((gateway, lane), {}).get(epoch)
        return cursor is None or seq < cursor.expected

    def recovered(self, gateway: str, lane: int, header: Header, checksum: int, now_ms: int) -> None:
        """Note a message that the log holds."""
        lanes = self.lane(gateway, lane)
        cursor = lanes.get(header.epoch) or self.begin(lanes, header.epoch, header.seq, now_ms)
        cursor.take(header.seq, checksum, now_ms)
        cursor.settled = cursor.expected

    def save(self) -> tuple[list[SavedCursor], list[tuple[str, int]]]:
        """Return (all cursors, the faults of epochs that are still known), in a fixed order."""
        saved = [
            SavedCursor(gateway, lane, epoch, cursor.expected, cursor.used_ms, sorted(cursor.recent.items()))
            for (gateway, lane), lanes in sorted(self.lanes.items())
            for epoch, cursor in sorted(lanes.items())
        ]
        known = {(cursor.gateway, cursor.epoch) for cursor in saved}
        return saved, sorted(self.faulted & known)

    def load(self, saved: Saved) -> None:
        """Replace everything by a snapshot."""
        self.lanes.clear()
        for one in saved.cursors:
            cursor = Cursor(one.expected, one.used_ms, dict(one.recent), one.expected)
            self.lane(one.gateway, one.lane)[one.epoch] = cursor
        self.faulted = set(saved.faulted)


_saved = msgspec.json.Decoder(Saved)


def encode_saved(saved: Saved) -> bytes:
    """Return a snapshot's bytes."""
    return msgspec.json.encode(saved)


def decode_saved(content: bytes, where: str) -> Saved:
    """Return a snapshot from its bytes; raises Damaged, also for a version that is not ours."""
    try:
        saved = _saved.decode(content)
    except msgspec.DecodeError as error:
        raise Damaged(where, 0, f"cursors: {error}") from None
    if saved.version != VERSION:
        raise Damaged(where, 0, f"cursors of version {saved.version}, this program reads {VERSION}")
    return saved
