"""Quarantine: readings of devices that nobody has provisioned yet, kept until their device is adopted.

A record is one message's readings of one device, as JSON. It is synced before the message is in the log, so a crash
between the two leaves a record of a message that comes again: the same (gateway, device, lane, epoch, seq) counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from citybrain.errors import Damaged, NotFound
from citybrain.model import Lane, Reading
from citybrain.segments import Reader, Writer, segments
from citybrain.storage import Files
from citybrain.units import METRICS
from citybrain.wire import MAX_SEQ, Header, finite

SEGMENT_BYTES = 8 * 1024 * 1024
MOST_SEGMENTS = 4  # what nobody adopts must not fill the disk: beyond this the oldest goes, counted
MOST_READINGS = 4096  # in one record, so that it fits whatever its values are
LONGEST_NAME = 128
HELD = 1  # the kind of a quarantine record
Key = tuple[int, int, int, int]  # lane, epoch, seq, part


class HeldReading(msgspec.Struct, frozen=True, array_like=True):
    """A reading without its device, which the record names once."""

    observed_at: int
    values: dict[str, float]


class Held(msgspec.Struct, frozen=True):
    """Readings of one unknown device in one message. `received_at` is Unix ms, platform time."""

    gateway: str
    lane: Lane
    epoch: int
    seq: int
    received_at: int
    device: str
    readings: list[HeldReading]
    part: int = 0

    @property
    def key(self) -> Key:
        return (int(self.lane), self.epoch, self.seq, self.part)


_held = msgspec.json.Decoder(Held)
Source = tuple[str, str]  # gateway, device: a device is unknown to one gateway


class Quarantine:
    """One shard's quarantine. Offsets begin at 1, so that they can number the frames that replay them.

    `pending[gateway, device][key]` is the offset of a record that has not been replayed. `hold` and `release` count
    from `settle` on; `discard` takes them back.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self.pending: dict[Source, dict[Key, int]] = {}
        self.warnings: list[str] = []
        self._files = files
        self._writer = Writer(folder, files, SEGMENT_BYTES)
        self._held: list[tuple[Source, Key, int | None]] = []
        self._released: dict[Source, dict[Key, int]] = {}

    def start(self, adopted: dict[str, int], replayed: set[int]) -> None:
        """Recover; of each `gateway/device` the records below `adopted[...]`, and those in `replayed`, are done.

        `adopted` then covers what is in `replayed`: a device's records are replayed in order.
        """
        self._writer.start(1)
        self.warnings += self._writer.warnings
        for offset, held in self._read(1):
            source = f"{held.gateway}/{held.device}"
            if offset in replayed:
                adopted[source] = offset + 1
            elif offset >= adopted.get(source, 0):
                self.pending.setdefault((held.gateway, held.device), {})[held.key] = offset

    @property
    def next_offset(self) -> int:
        return self._writer.next_offset

    @property
    def waiting(self) -> int:
        """How many records wait for their device."""
        return sum(map(len, self.pending.values()))

    def hold(self, gateway: str, lane: Lane, header: Header, received_at: int, readings: Iterable[Reading]) -> None:
        """Append a message's readings of unknown devices, a record a device.

        Only what could ever be used is kept: metrics we know, numbers, times that are one, names of a sane length.
        """
        by_device: dict[str, list[HeldReading]] = {}
        for reading in readings:
            known = {name: x for name, x in reading.values.items() if name in METRICS and finite(x)}
            if known and len(reading.device) <= LONGEST_NAME and abs(reading.observed_at) <= MAX_SEQ:
                by_device.setdefault(reading.device, []).append(HeldReading(reading.observed_at, known))
        for device, own in by_device.items():
            for part, start in enumerate(range(0, len(own), MOST_READINGS)):
                some = own[start : start + MOST_READINGS]
                self._append(Held(gateway, lane, header.epoch, header.seq, received_at, device, some, part))

    def _append(self, held: Held) -> None:
        source = (held.gateway, held.device)
        offset = self._writer.append(HELD, held.received_at, msgspec.json.encode(held))
        keys = self.pending.setdefault(source, {})
        self._held.append((source, held.key, keys.get(held.key)))
        keys[held.key] = offset

    def release(self, source: Source) -> list[tuple[int, Held]]:
        """Take a device's records out, in order, to be replayed."""
        keys = self._released[source] = self.pending.pop(source)
        wanted = set(keys.values())
        return [(offset, held) for offset, held in self._read(min(wanted)) if offset in wanted]

    def sync(self) -> int:
        """Make what is held durable; return how many records had to go because nobody adopted them.

        Raises DiskFull: then call `discard`.
        """
        if not self._held:
            return 0
        self._writer.commit()
        self._held.clear()
        return self._trim()

    def settle(self) -> None:
        """What was released stands in the log."""
        self._released.clear()

    def discard(self) -> None:
        """Take back what was held since the last `sync` and released since the last `settle`."""
        self._writer.discard()
        for source, keys in self._released.items():
            self.pending[source] = keys | self.pending.get(source, {})
        self._released.clear()
        for source, key, before in reversed(self._held):
            if before is None:
                del self.pending[source][key]
            else:
                self.pending[source][key] = before
        self._held.clear()

    def _trim(self) -> int:
        found = segments(self._files, self.folder)
        if len(found) <= MOST_SEGMENTS:
            return 0
        first = found[-MOST_SEGMENTS]
        self._writer.drop_before(first)
        before = self.waiting
        for source, keys in list(self.pending.items()):
            self.pending[source] = {key: offset for key, offset in keys.items() if offset >= first}
        return before - self.waiting

    def _read(self, first: int) -> Iterator[tuple[int, Held]]:
        try:
            for record in Reader(self.folder, first, self._files):
                yield record.offset, _held.decode(record.payload)
        except (Damaged, msgspec.DecodeError) as error:
            self.warnings.append(f"{self.folder}: {error}; what stands behind it is left out")

    def close(self) -> None:
        self._writer.close()


def waiting(folder: Path, files: Files) -> Iterator[Held]:
    """Yield all records of one shard's quarantine, for a process that only looks; what is damaged ends it early."""
    found = segments(files, folder)
    try:
        for record in Reader(folder, found[0], files) if found else ():
            yield _held.decode(record.payload)
    except (Damaged, NotFound, msgspec.DecodeError, OSError):
        return
