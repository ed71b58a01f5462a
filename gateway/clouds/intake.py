"""The intake of operators' clouds: what is new is numbered in the spools of virtual gateways, what is repeated is not.

A core: no socket, no clock. Many pushes are taken, then `commit` makes them durable together: first the spools, then
the table of what was seen. A crash between the two leaves messages in a spool that the table does not know; `open`
learns them from there.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from citybrain.counters import Counters
from citybrain.errors import DiskFull, Unavailable
from citybrain.model import READING_LANES, Lane, Reading
from citybrain.wire import columns_of
from gateway.clouds.devices import Devices
from gateway.clouds.mapping import Said, Taken
from gateway.clouds.seen import Seen, day_of, key_of
from gateway.spool import Spool

BATCH_READINGS = 1000  # in one message; with four values each about 70 kB


class Lot(msgspec.Struct, eq=False):
    """What one commit puts into one lane of one gateway."""

    readings: list[Reading]
    keys: set[int]
    last_seq: int = 0
    stored: bool = False


class Receipt(msgspec.Struct, eq=False):
    """What became of one body: true once `commit` has returned and `stored` says so."""

    operator: str
    taken: Taken
    lots: list[Lot] = []
    accepted: int = 0
    repeated: int = 0
    cursor: str | None = None

    @property
    def stored(self) -> bool:
        """Whether everything it holds is durable."""
        return all(lot.stored for lot in self.lots)


class Intake:
    """Takes what operators say. Raises StorageError where a disk fails otherwise than by being full.

    counters, in messages of bodies that were stored: `received_total` = `accepted_total` (something in it was new) +
    `repeated_total` + what `dropped_total` counts by message; `recovered_total`: accepted by a pull.
    """

    def __init__(self, seen: Seen, counters: Counters) -> None:
        self.seen = seen
        self.counters = counters
        self.spools: dict[str, Spool] = {}
        self._lots: dict[tuple[str, Lane], Lot] = {}
        self._receipts: list[Receipt] = []

    def open(self, gateway: str, spool: Spool, now_ms: int) -> None:
        """Recover a gateway's spool, and learn from it what was stored and not remembered any more."""
        spool.start()
        keys: set[int] = set()
        marks: dict[tuple[str, Lane], int] = {}
        for lane in READING_LANES:
            behind = spool.next_seq(lane)
            for seq in range(min(self.seen.mark(gateway, lane), behind - 1) + 1, behind):
                keys.update(_keys_in(spool.body(lane, seq)))
            marks[gateway, lane] = behind - 1
        self.seen.hold(keys, marks, {})
        self.seen.save(day_of(now_ms))
        self.spools[gateway] = spool

    def take(
        self, operator: str, own: list[str], devices: Devices, taken: Taken, now_ms: int, cursor: str | None = None
    ) -> Receipt:
        """Take a body; nothing counts before `commit`. own: the operator's gateways.

        Raises Unavailable, with nothing taken, where there is no gateway or no room for it.
        """
        self._check_room(operator, own)
        receipt = Receipt(operator, taken, cursor=cursor)
        routed = self._routed(own, devices, taken)
        keys = [
            key_of(said.device, name, said.observed_at, value)
            for said, _ in routed
            for values in said.values
            for name, value in values.items()
        ]
        known = self.seen.known(keys, day_of(now_ms)) if keys else set()
        following = iter(keys)
        for said, gateway in routed:
            new = False
            for lane in READING_LANES:
                told = zip(said.values[lane].items(), following, strict=False)
                fresh = {key: one for one, key in told if key not in known}
                if fresh:
                    new |= self._put(receipt, self._lot(gateway, lane), said, fresh)
            receipt.accepted += new
        receipt.repeated = len(routed) - receipt.accepted
        self._receipts.append(receipt)
        return receipt

    def _lot(self, gateway: str, lane: Lane) -> Lot:
        lot = self._lots.get((gateway, lane))
        if lot is None:
            lot = self._lots[gateway, lane] = Lot([], set())
        return lot

    @staticmethod
    def _put(receipt: Receipt, lot: Lot, said: Said, fresh: dict[int, tuple[str, float]]) -> bool:
        """Put values into a lot, unless they are in it; return whether any was not. The receipt needs the lot."""
        if not any(lot is one for one in receipt.lots):
            receipt.lots.append(lot)
        values = {name: value for key, (name, value) in fresh.items() if key not in lot.keys}
        if not values:
            return False
        lot.keys.update(fresh)
        lot.readings.append(Reading(said.device, said.observed_at, values))
        return True

    def _check_room(self, operator: str, own: list[str]) -> None:
        if not own:
            raise Unavailable(f"operator {operator!r} has no gateway in the registry in force; provision one a shard")
        if self.seen.full:
            raise Unavailable(f"{self.seen.path}: no space left on the device; free some")
        for gateway in own:
            if self.spools[gateway].full:
                raise Unavailable(f"{self.spools[gateway].folder}: the spool is full; is the broker away?")

    @staticmethod
    def _routed(own: list[str], devices: Devices, taken: Taken) -> list[tuple[Said, str]]:
        """Return what was said with the gateway that carries it; a device of somebody else's is dropped."""
        routes: dict[str, str | None] = {}
        found = []
        for said in taken.said:
            if said.device not in routes:
                routes[said.device] = devices.route(own, said.device)
            gateway = routes[said.device]
            if gateway is None:
                taken.drop("foreign_device", said.device, "this device belongs to another operator or gateway")
            else:
                found.append((said, gateway))
        return found

    def vital(self, gateway: str, reading: Reading) -> None:
        """Take a virtual gateway's own reading."""
        self._lots.setdefault((gateway, Lane.TELEMETRY), Lot([], set())).readings.append(reading)

    @property
    def waiting(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self._lots or self._receipts)

    def commit(self, now_ms: int) -> None:
        """Make what was taken durable in the spools, as far as there is room; `Receipt.stored` says what is."""
        lots, self._lots = self._lots, {}
        receipts, self._receipts = self._receipts, []
        for (gateway, lane), lot in lots.items():
            lot.readings.sort(key=_observed)  # what comes in disorder is less often late this way
            for start in range(0, len(lot.readings), BATCH_READINGS):
                batch = lot.readings[start : start + BATCH_READINGS]
                lot.last_seq = self.spools[gateway].append(lane, batch, now_ms)
        for gateway in {gateway for gateway, _ in lots}:
            self._commit(gateway)
        for (gateway, lane), lot in lots.items():
            lot.stored = self.spools[gateway].next_seq(lane) > lot.last_seq
        self.seen.hold(
            (key for lot in lots.values() if lot.stored for key in lot.keys),
            {name: lot.last_seq for name, lot in lots.items() if lot.stored and lot.keys},
            {r.operator: r.cursor for r in receipts if r.cursor is not None and r.stored},
        )
        for receipt in receipts:
            if receipt.stored:
                self._count(receipt)

    def _commit(self, gateway: str) -> None:
        try:
            self.spools[gateway].commit()
        except DiskFull as error:  # the operator is told, and comes again
            self._full(error)

    def save(self, now_ms: int) -> None:
        """Let the table of what was seen catch up with the spools, durably.

        To be called before acknowledgements are processed: they free messages, and what is only there would be
        forgotten. Where the disk is full they may all the same, or no room would ever come.
        """
        try:
            self.seen.save(day_of(now_ms))
        except DiskFull as error:
            self._full(error)

    def _full(self, error: DiskFull) -> None:
        self.counters.add("errors_total", stage="disk_full")
        self.counters.warn(str(error))

    def _count(self, receipt: Receipt) -> None:
        self.counters.add("received_total", receipt.taken.received)
        self.counters.add("accepted_total", receipt.accepted)
        self.counters.add("repeated_total", receipt.repeated)
        if receipt.cursor is not None:
            self.counters.add("recovered_total", receipt.accepted)
        for reason, amount in receipt.taken.dropped.items():
            self.counters.drop(reason, amount)
        for problem in receipt.taken.problems[:1]:
            self.counters.warn(f"{receipt.operator}: {problem['reason']}: {problem['where']}: {problem['what']}")


def _observed(reading: Reading) -> int:
    return reading.observed_at


def _keys_in(body: bytes | None) -> Iterator[int]:
    """Yield the keys of a spooled message's values."""
    if body is None:
        return
    (devices, metrics), (base, value, time, device, metric) = columns_of(body)
    for number, after, d, m in zip(value, time, device, metric, strict=True):
        yield key_of(devices[d], metrics[m], base + after, number)
