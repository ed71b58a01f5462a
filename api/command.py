"""`citybrain api`."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from api.app import create_app
from api.disk import DiskWatch
from api.readings import Latest
from api.server import Server, listen
from api.site import Site
from citybrain.cli import Subcommand
from citybrain.clock import wait_s
from citybrain.counters import Counters
from citybrain.db.place import add_database, layout_of
from citybrain.db.store import open_store
from citybrain.errors import CityBrainError
from citybrain.layout import Layout, Run
from streams.logs import LogStore
from streams.runtimes.stores import add_arguments, open_place

if TYPE_CHECKING:
    from api.boxes import Boxes

FOLLOW_S = 0.2  # how often the log is looked at for newer values
STOP_S = 1  # what answers under way get to end in


class Background(threading.Thread):
    """Follows the log and publishes the heartbeat, until `stop` is set."""

    def __init__(
        self,
        latest: Latest,
        disk: DiskWatch,
        counters: Counters,
        stop: threading.Event,
        boxes: BoxWatch,
    ) -> None:
        super().__init__(name="follow", daemon=True)
        self._boxes = boxes
        self._latest = latest
        self._disk = disk
        self._counters = counters
        self._stop_event = stop

    def run(self) -> None:
        self._guarded(self._latest.start)
        while not self._stop_event.is_set():
            taken = self._guarded(self._latest.follow)
            self._counters.publish()
            self._guarded(self._disk.look)
            self._guarded(self._boxes.look, "boxes")
            if not taken:
                wait_s(FOLLOW_S, self._stop_event)

    def _guarded(self, step: Callable[[], int | None], stage: str = "readings") -> int:
        """Do one step; what fails is counted and said, and the heartbeat goes on: values then are just not newer."""
        try:
            return step() or 0
        except (CityBrainError, OSError) as error:
            self._counters.add("errors_total", stage=stage)
            self._counters.warn(f"{stage}: {error}")
            return 0


def serve(layout: Layout, run: Run, logs: LogStore) -> None:
    """Serve until SIGINT or SIGTERM; raises Unavailable where the port is taken."""
    counters = Counters("api", layout.run)
    counters.resume()
    with listen(run.api_host, run.api_port) as taken:
        latest = Latest(layout, run.shards, counters, logs)
        site = Site(layout, run, latest, counters, logs)
        app = create_app(site)
        server = Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_S, ws="none")
        )
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        boxes = BoxWatch(site)
        background = Background(latest, site.disk, counters, stop, boxes)
        background.start()
        try:
            server.run(sockets=[taken])
        finally:
            stop.set()
            background.join(1.0)
            boxes.stop()


class BoxWatch:
    """Serves boxes as soon as there is a certificate authority; without one nothing of it is loaded."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._boxes: Boxes | None = None

    def look(self) -> None:
        """Do what is due; called again and again. Raises as Boxes.look does."""
        if self._boxes is None:
            if not (self._site.layout.ca / "server.pem").exists():
                return
            from api.boxes import Boxes  # noqa: PLC0415  few runs need it
            from api.pki.ca import Authority  # noqa: PLC0415

            self._boxes = Boxes(self._site, Authority(self._site.layout))
        self._boxes.look()

    def stop(self) -> None:
        """End what was begun."""
        if self._boxes is not None:
            self._boxes.stop()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve the HTTP API and the status page on the address in run/run.json."
    add_database(parser)
    add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    layout = layout_of(args)
    if layout.store:  # whether it answers is seen by each request; what is wrong in the URL is said now
        open_store(layout.place, readonly=True).dispose()
    run = layout.read_run()
    layout.make()
    place = open_place(args, layout, run.shards)
    serve(place.layout, run, place.logs)
    return 0


command = Subcommand("serve the HTTP API and the status page", _arguments, _run)
