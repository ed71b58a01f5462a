"""`citybrain desk`: the desk as a process, with its deliveries and its heartbeat."""

from __future__ import annotations

import argparse
import signal
import threading

from api.desk import Desk
from api.outbox import Deliverer
from api.platforms.webhook import read_secret
from citybrain.cli import Subcommand
from citybrain.clock import real_unix_ms, wait_s
from citybrain.counters import PERIOD_S, Counters
from citybrain.db.store import open_store
from citybrain.errors import DiskFull, Unavailable
from citybrain.layout import Layout, Run
from rules.categories import load_categories
from streams.runtimes.stores import add_arguments, open_place

IDLE_S = 0.02
FULL_S = 0.5  # how long to wait for room on a full disk


class Loop:
    """Steps, deliveries and heartbeats, until `stop` is set."""

    def __init__(self, desk: Desk, deliverer: Deliverer | None, run: Run, counters: Counters) -> None:
        self.desk = desk
        self.deliverer = deliverer
        self.run = run
        self.counters = counters
        self.stop = threading.Event()
        self._gauged_ms = 0
        self._unwritten: list[str] = []

    def __call__(self) -> None:
        """Go round, waiting out a full disk and a silent log; what else the database refuses ends the process."""
        while not self.stop.is_set():
            try:
                taken = self.once()
            except (DiskFull, Unavailable) as error:  # nothing was written; the next round takes the same again
                self.counters.add("errors_total", stage="disk_full" if isinstance(error, DiskFull) else "log")
                self.counters.warn(str(error))
                self.counters.publish()
                wait_s(FULL_S, self.stop)
                continue
            self._publish()
            if not taken:
                wait_s(IDLE_S, self.stop)
        self.counters.publish(force=True)

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
    parser.add_argument("--platform", metavar="URL", help="where cases go (default: the run's own grid platform)")
    add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    layout.make()
    run = layout.read_run()
    counters = Counters("desk", layout.run)
    counters.resume()
    counters.publish(force=True)
    place = open_place(args, layout, run.shards)
    desk = Desk(
        open_store(layout.database),
        place.layout,
        range(run.shards),
        load_categories(),
        counters=counters,
        logs=place.logs,
    )
    deliverer = make_deliverer(layout, run, args.platform)
    loop = Loop(desk, deliverer, run, counters)
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
        desk.store.dispose()
    return 0


command = Subcommand("decide on alarms, incidents and cases, and deliver them", _arguments, _run)
