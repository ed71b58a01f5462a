"""`citybrain desk`: the desk as a process, with its deliveries and its heartbeat."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import threading

from api.desk import Desk
from api.lease import LEASE_S, RENEW_S, Lease
from api.outbox import Deliverer
from api.platforms.webhook import read_secret
from citybrain.cli import Subcommand
from citybrain.clock import real_unix_ms, wait_s
from citybrain.counters import PERIOD_S, Counters
from citybrain.db.place import add_database, layout_of
from citybrain.db.store import open_store
from citybrain.errors import DiskFull, Fenced, StorageError, Unavailable, UsageError
from citybrain.layout import Layout, Run
from rules.categories import load_categories
from streams.runtimes.stores import add_arguments, open_place

IDLE_S = 0.02
STANDBY_S = 0.5  # how often a desk that stands by looks whether it is needed
FULL_S = 0.5  # how long to wait for room on a full disk


class Loop:
    """Steps, deliveries and heartbeats while this desk has the lease, until `stop` is set; else it stands by."""

    def __init__(self, desk: Desk, lease: Lease, deliverer: Deliverer | None, run: Run, counters: Counters) -> None:
        self.desk = desk
        self.lease = lease
        self.deliverer = deliverer
        self.run = run
        self.counters = counters
        self.stop = threading.Event()
        self._gauged_ms = 0
        self._unwritten: list[str] = []

    def __call__(self) -> None:
        """Go round, waiting out a full disk, a silent log and an absent database; what else it refuses ends us."""
        while not self.stop.is_set():
            try:
                taken = self._round()
            except Fenced as error:
                self._stand_by(str(error))
            except (DiskFull, Unavailable) as error:  # nothing was written; the next round takes the same again
                self.counters.add("errors_total", stage="disk_full" if isinstance(error, DiskFull) else "log")
                self.counters.warn(str(error))
                self.counters.publish()
                wait_s(FULL_S, self.stop)
            else:
                if not taken:
                    wait_s(IDLE_S if self.lease.held else STANDBY_S, self.stop)
        self.counters.publish(force=True)

    def _round(self) -> int:
        """Do what a holder does, or look whether we can be it; return how many inputs were taken."""
        if self.lease.held:
            self.lease.renew()
        elif not self.lease.take():
            self._wait_standing()
            return 0
        else:
            self._take_over()
        taken = self.once()
        self._publish()
        return taken

    def _take_over(self) -> None:
        self.counters.add("takeovers_total")
        self.counters.gauges["standby"] = 0.0
        self.desk.resume()

    def _stand_by(self, why: str) -> None:
        """Another desk has taken over while we were away: what we hold counts nowhere any more."""
        self.counters.add("fenced_total")
        self.counters.warn(why)
        if self.deliverer is not None:
            self.deliverer.withdraw()
        self._wait_standing()

    def _wait_standing(self) -> None:
        """Say that we stand by: what the holder measures is not ours to tell."""
        self.counters.gauges.clear()
        self.counters.gauges["standby"] = 1.0
        self.counters.publish()

    def once(self) -> int:
        """Take what is there, hand over what is due; return how many inputs were taken."""
        now_ms = self.run.clock.now_ms()
        if self.deliverer is None:
            return self._step(now_ms)
        results = self.deliverer.results()
        self.desk.accept(results)
        if results:
            self._note(sum(result.outcome == "delivered" for result in results), results[-1].error)
            self._unwritten += [result.id for result in results]
        taken = self._step(now_ms)
        if self._unwritten:
            self.deliverer.written([id for id in self._unwritten if not self.desk.holds(id)])
            self._unwritten = [id for id in self._unwritten if self.desk.holds(id)]
        self.deliverer.offer(self.desk.due(real_unix_ms()))
        return taken

    def _step(self, now_ms: int) -> int:
        """Take a step, and count how long what it took had waited since ingest received it, or since it was made."""
        taken = self.desk.step(now_ms)
        if taken:
            clock = self.run.clock
            now_ms = clock.now_ms()
            for name, times in (("lag_s", self.desk.taken), ("outbox_s", self.desk.delivered)):
                for at_ms in times:
                    self.counters.delayed(name, clock.real_s(now_ms - at_ms))
        return taken

    def _note(self, delivered: int, error: str | None) -> None:
        self.counters.add("sent_total", delivered)
        if error is not None:
            self.counters.add("errors_total", stage="delivery")
            if error not in self.counters.warnings[-5:]:  # a platform that is down is one line, not thousands
                self.counters.warn(error)

    def _publish(self) -> None:
        now_ms = real_unix_ms()
        if abs(now_ms - self._gauged_ms) >= PERIOD_S * 1000:
            self._gauged_ms = now_ms
            self.desk.gauge(self.run.clock.now_ms())
        self.counters.publish()


def make_deliverer(layout: Layout, run: Run, endpoint: str | None) -> Deliverer | None:
    """Return what delivers to the grid platform, None where no secret is agreed; raises ConfigError."""
    secret = read_secret(layout.secrets / "platform.key")
    if secret is None:
        return None
    return Deliverer(endpoint or f"http://{run.host}:{run.platform_port}/cases", secret)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Decide on alarms, incidents and cases, and deliver them. Several desks may run on one PostgreSQL, each with a "
        "--name of its own: one works, the others stand by and take over where it is silent for --lease-s."
    )
    parser.add_argument("--platform", metavar="URL", help="where cases go (default: the run's own grid platform)")
    parser.add_argument("--name", default="desk", help="what this desk is called: desk, or desk-SOMETHING")
    parser.add_argument("--lease-s", type=float, default=LEASE_S, metavar="S", help=f"default: {LEASE_S:g}")
    add_database(parser)
    add_arguments(parser)


def _checked(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"desk(-[a-z0-9]{1,20})?", args.name):
        raise UsageError(f"--name {args.name}: expected desk, or desk- and letters or digits, such as desk-b")
    if not 2 * RENEW_S <= args.lease_s <= 300:
        raise UsageError(f"--lease-s {args.lease_s:g}: expected {2 * RENEW_S:g} to 300 seconds")


def _run(args: argparse.Namespace) -> int:
    _checked(args)
    layout = layout_of(args)
    layout.make()
    run = layout.read_run()
    counters = Counters(args.name, layout.run)
    counters.resume()
    counters.publish(force=True)
    place = open_place(args, layout, run.shards)
    store = open_store(layout.place)
    lease = Lease(store, args.name, args.lease_s)
    desk = Desk(
        store, place.layout, range(run.shards), load_categories(), counters=counters, logs=place.logs, lease=lease
    )
    deliverer = make_deliverer(layout, run, args.platform)
    loop = Loop(desk, lease, deliverer, run, counters)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop.set())
    desk.start()
    if deliverer is not None:
        deliverer.start()
    try:
        loop()
    finally:
        if deliverer is not None:
            deliverer.stop()
        with contextlib.suppress(StorageError, Unavailable):  # then it runs out by itself
            lease.release()
        store.dispose()
    return 0


command = Subcommand("decide on alarms, incidents and cases, and deliver them", _arguments, _run)
