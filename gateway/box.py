"""`citybrain gateway run`: drivers → agent → spool → uplink, and orders back, on one thread.

A configuration is one `Box`. Another one put in force is another Box in the same process, over the same spool.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from citybrain.clock import SECOND_MS, monotonic_s
from citybrain.errors import CityBrainError, DiskFull, StorageError, Unavailable
from citybrain.layout import Layout
from citybrain.model import Lane
from citybrain.orders import Order
from citybrain.storage import OS_FILES, Files
from citybrain.wire import About
from edge.agent import Agent
from edge.mailbox import Blob
from gateway.config import GatewayConfig
from gateway.held import Held
from gateway.journal import JournalCounters
from gateway.lines import Lines
from gateway.orders import Orders
from gateway.pace import Paced
from gateway.points import write_points
from gateway.service import Broker, GatewayService
from gateway.spool import Spool
from gateway.times import BoxClock
from gateway.uplink import Uplink
from gateway.vitals import Vitals
from gateway.watchdog import Watchdog

STEP_S = 0.05  # an event waits at most so long for its sync
SECOND_S = 1.0
BATCH = 2000  # readings of a message at most; the spool splits what is too large
SERIALS = ("/sys/firmware/devicetree/base/serial-number", "/etc/machine-id")  # a Pi's board; anything else's system
SPOOL, ORDERS, MARK, LOCK = "spool", "orders.json", "clock", "gateway.lock"


def board_serial() -> str:
    """Return what binds the spool to this board: its serial, where it has none the system's id, else "unknown"."""
    for path in map(Path, SERIALS):
        try:
            found = path.read_text(encoding="ascii", errors="replace").strip("\0 \n")
        except OSError:
            continue
        if found:
            return found[:128]
    return "unknown"


def release() -> str:
    """Return our software's version, "" where it was never installed."""
    try:
        return version("citybrain-senses")
    except PackageNotFoundError:
        return ""


class Box:
    """The gateway of one data folder, working to one configuration. `run` returns when that is over."""

    def __init__(
        self,
        folder: Path,
        config: GatewayConfig,
        counters: JournalCounters,
        clock: BoxClock,
        orders: Orders,
        watchdog: Watchdog,
        files: Files = OS_FILES,
    ) -> None:
        self.config = config
        self.lines = Lines(config, counters, clock)
        self.counters = counters
        self.clock = clock
        self.orders = orders
        limit_bytes = config.spool.limit_mb * 1024 * 1024
        self.spool = Spool(
            folder / SPOOL, board_serial(), files, limit_bytes, counters=counters, age_ms=config.spool.age
        )
        self._sink = Paced(self.spool, monotonic_s, config.spool.commit_every / SECOND_MS)
        self._watchdog = watchdog
        self._about = About(release(), config.sha256)
        self._broker = broker_of(folder, config)
        self._inbox: list[bytes] = []
        self._second_s = 0.0

    def start(self) -> None:
        """Recover the spool and start the drivers; raises StorageError."""
        self.spool.start()
        uplink = Uplink(self.spool, self.config.gateway, self.config.shard, compress=True)
        self.service = GatewayService(
            uplink, self.config.gateway, self.config.shard, self._broker, self.clock, self._inbox.append
        )
        tls = self._broker.tls
        certificate = Path(tls.certificate) if tls is not None else None
        vitals = Vitals(self.config.gateway, self.spool, self.clock, self.counters, certificate)
        self.service.tell(self._about)
        linger_ms = min(self.config.spool.commit_every, SECOND_MS)
        self._held = Held([self.lines, vitals], self.clock, self.counters)
        self._agent = Agent([self._held], self._sink, BATCH, linger_ms)
        self.lines.hosts.start()

    def step(self, timeout_s: float = STEP_S) -> list[Order]:
        """Take what the drivers have, move what the network takes; return the orders that came.

        Raises StorageError where the disk fails, CityBrainError where the drivers need a new process.
        """
        now_s = monotonic_s()
        if now_s - self._second_s >= SECOND_S:
            self._second_s = now_s
            self._every_second()
        self._sample()
        if self.lines.hosts.exhausted:
            raise CityBrainError(f"{self.lines.hosts.exhausted}: the process ends so that it is started anew")
        self.service.poll(timeout_s)
        self._answer()
        inbox, self._inbox[:] = list(self._inbox), []
        taken = (self.orders.take(payload, self.clock.now_ms(), dated=not self.clock.unset) for payload in inbox)
        return [order for order in taken if order is not None]

    def _sample(self) -> None:
        try:
            self._agent.step(self.clock.now_ms())
            for driver, blob in self.lines.hosts.blobs():
                self._keep(driver, blob)
            self._sink.commit()
        except DiskFull as error:  # what did not fit is counted by the spool, by lane and reason
            self.counters.add("errors_total", stage="disk_full")
            self.counters.warn(str(error))

    def _keep(self, driver: str, blob: Blob) -> None:
        try:
            self.spool.put_blob(blob.content, self.clock.now_ms(), unmasked=blob.unmasked)
        except ValueError as error:
            self.counters.drop("blob_size")
            self.counters.warn(f"evidence of {driver}: {error}")

    def _answer(self) -> None:
        for id, ok, text in self.lines.answers():
            self.orders.answered(id, ok, text, self.clock.now_ms())
        for answer in self.orders.replies():
            if not self.service.reply(msgspec.json.encode(answer)):
                return
            self.orders.sent(answer.id)

    def _every_second(self) -> None:
        self.clock.follow()
        if not self.clock.unset:
            self.spool.expire(self.clock.now_ms())
        self.service.count_bytes()
        gauges, details = self.counters.gauges, self.counters.details
        gauges["spooled"] = float(self.spool.spooled())
        gauges["online"] = float(self.service.ready)
        gauges["clock_offset_s"] = self.clock.offset_s
        self.service.tell(msgspec.structs.replace(self._about, failing=self.lines.failing()))
        wrong = self.lines.wrong()
        gauges["wrong"] = float(len(wrong))
        details["gateway"] = {
            "id": self.config.gateway,
            "shard": self.config.shard,
            "broker": f"{self._broker.host}:{self._broker.port}",
            "no_connection": self.service.reason,
            "clock_unset": self.clock.unset,
            "drivers": [one.name for one in self.config.drivers],
            "wrong": wrong,
        }
        self.counters.publish()
        write_points(self.counters.live, self.lines.hosts, self.clock.now_ms())
        self._watchdog.status(self._status(wrong))

    def _status(self, wrong: dict[str, str]) -> str:
        line = "online" if self.service.ready else f"offline ({self.service.reason or 'connecting'})"
        return f"{line}; {self.spool.spooled()} spooled; {len(wrong)} things wrong"

    def close(self) -> None:
        """Stop the drivers, make durable what they gave, say goodbye."""
        now_ms = self.clock.now_ms()
        last = self._held.release() + self.lines.hosts.stop(now_ms)
        try:
            self._agent.flush(now_ms)
            for lane in Lane:
                self.spool.append(lane, [reading for there, reading in last if there is lane], now_ms)
            self._sink.flush()
        except DiskFull as error:
            self.counters.warn(str(error))
        finally:
            self.service.poll(0.0)
            self.service.close()
            self.spool.close()
            self.counters.publish(force=True)


def broker_of(folder: Path, config: GatewayConfig) -> Broker:
    """Return the broker a configuration names, its files below the data folder."""
    part = config.broker
    return Broker(part.host, part.port, tls=part.tls.under(folder) if part.tls is not None else None)


@contextmanager
def sole(layout: Layout) -> Iterator[None]:
    """Hold the data folder; raises Unavailable where another gateway process has it, StorageError."""
    OS_FILES.make(layout.run)
    path = layout.run / LOCK
    try:
        lock = path.open("w")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unavailable(f"{layout.root}: another `citybrain gateway run` works in this folder") from None
        yield
