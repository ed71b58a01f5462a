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
from citybrain.model import Lane, Reading
from citybrain.wire import columns_of
from gateway.clouds.devices import Devices
from gateway.clouds.mapping import Taken
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
        for lane in Lane:
            behind = spool.next_seq(lane)
            for seq in range(min(self.seen.mark(gateway, lane), behind - 1) + 1, behind):
                keys.update(_keys_in(spool.body(lane, seq)))
            marks[gateway, lane] = behind - 1
        self.seen.save(keys, marks, {}, day_of(now_ms))
        self.spools[gateway] = spool

    def take(
        self, operator: str, own: list[str], devices: Devices, taken: Taken, now_ms: int, cursor: str | None = None
    ) -> Receipt:
        """Take a body; nothing counts before `commit`. own: the operator's gateways.

        Raises Unavailable, with nothing taken, where there is no gateway or no room for it.
        """
        self._check_room(operator, own)
        receipt = Receipt(operator, taken, cursor=cursor)
        values = [
            (said, lane, name, value, key_of(said.device, name, said.observed_at, value))
            for said in taken.said
            for lane in Lane
            for name, value in said.values[lane].items()
        ]
        known = self.seen.known([row[4] for row in values], day_of(now_ms)) if values else set()
        fresh: dict[tuple[int, Lane], Reading] = {}
        routes = self._routes(own, devices, taken)
        for said, lane, name, value, key in values:
            gateway = routes.get(said.device)
            if gateway is None or key in known:
                continue
            lot = self._lots.setdefault((gateway, lane), Lot([], set()))
            if not any(lot is one for one in receipt.lots):
                receipt.lots.append(lot)
            if key not in lot.keys:
                lot.keys.add(key)
                reading = fresh.get((id(said), lane))
                if reading is None:
                    reading = fresh[id(said), lane] = Reading(said.device, said.observed_at, {})
                    lot.readings.append(reading)
                reading.values[name] = value
        return self._tally(receipt, {id_ for id_, _ in fresh}, routes)

    def _tally(self, receipt: Receipt, fresh: set[int], routes: dict[str, str | None]) -> Receipt:
        receipt.accepted = len(fresh)
        receipt.repeated = sum(routes[said.device] is not None for said in receipt.taken.said) - len(fresh)
        self._receipts.append(receipt)
        return receipt

    def _check_room(self, operator: str, own: list[str]) -> None:
        if not own:
            raise Unavailable(f"operator {operator!r} has no gateway in the registry in force; provision one a shard")
        if self.seen.owing:
            raise Unavailable(f"{self.seen.path}: no space left on the device; free some")
        for gateway in own:
            if self.spools[gateway].full:
                raise Unavailable(f"{self.spools[gateway].folder}: the spool is full; is the broker away?")

    def _routes(self, own: list[str], devices: Devices, taken: Taken) -> dict[str, str | None]:
        routes: dict[str, str | None] = {}
        for said in taken.said:
            if said.device not in routes:
                routes[said.device] = devices.route(own, said.device)
            if routes[said.device] is None:
                taken.drop("foreign_device", said.device, "this device belongs to another operator or gateway")
        return routes

    def vital(self, gateway: str, reading: Reading) -> None:
        """Take a virtual gateway's own reading."""
        self._lots.setdefault((gateway, Lane.TELEMETRY), Lot([], set())).readings.append(reading)

    @property
    def waiting(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self._lots or self._receipts or self.seen.owing)

    def commit(self, now_ms: int) -> None:
        """Make what was taken durable, as far as there is room; `Receipt.stored` says what is."""
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
        self._remember(lots, receipts, now_ms)
        for receipt in receipts:
            if receipt.stored:
                self._count(receipt)

    def _commit(self, gateway: str) -> None:
        try:
            self.spools[gateway].commit()
        except DiskFull as error:  # the operator is told, and comes again
            self._full(error)

    def _remember(self, lots: dict[tuple[str, Lane], Lot], receipts: list[Receipt], now_ms: int) -> None:
        keys = {key for lot in lots.values() if lot.stored for key in lot.keys}
        marks = {name: lot.last_seq for name, lot in lots.items() if lot.stored and lot.keys}
        cursors = {r.operator: r.cursor for r in receipts if r.cursor is not None and r.stored}
        try:
            self.seen.save(keys, marks, cursors, day_of(now_ms))
        except DiskFull as error:  # it stays in memory, and in the spools' last segments
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
