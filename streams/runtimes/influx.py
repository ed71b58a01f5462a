"""`citybrain influx`: the process that writes the log's values to an InfluxDB; nobody waits for it.

While the server is slow, away or refuses, the process stays behind in the log and says so; the log is its spill, as far
back as it is kept.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from citybrain.cli import Subcommand, emit
from citybrain.clock import monotonic_s, wait_s
from citybrain.counters import Counters, process_name
from citybrain.errors import DiskFull, Unavailable
from citybrain.layout import Layout, Run
from citybrain.storage import OS_FILES
from streams.projection.config import Target, read_target, read_token
from streams.projection.follower import Follower, loader, mark_path
from streams.projection.server import Server
from streams.runtimes.ingest import parse_shards
from streams.runtimes.stores import Place, add_arguments, open_place

IDLE_S = 0.5  # when everything is written: what comes meanwhile is one request
WAITING_S = 0.1  # between two looks whether the server may be asked again
TROUBLE_S = 2.0  # how long to wait for room on a full disk, or for Kafka


def take_shard(layout: Layout, shard: int) -> IO[str]:
    """Take a shard's mark for this process alone, until it ends; raises Unavailable where another one has it."""
    path = mark_path(layout, shard).with_suffix(".lock")
    OS_FILES.make(path.parent)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Unavailable(
            f"{path}: another `citybrain influx` has shard {shard}; stop it, or give other --shards"
        ) from None
    return file


class InfluxProcess:
    """The loop over all shards of this process. `run` returns when `stop` has been called."""

    def __init__(self, place: Place, run: Run, shards: Sequence[int], target: Target) -> None:
        layout = place.layout
        self._taken = [take_shard(layout, shard) for shard in shards]
        self.counters = Counters(process_name("influx", shards, run.shards), layout.run)
        self.server = Server(target, layout.secrets)
        load = loader(layout)
        self.followers = [Follower(layout, place.logs, shard, self.server, self.counters, load) for shard in shards]
        self._clock = run.clock
        self._stopping = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until stopped; raises StorageError where a log cannot be read or a disk fails for good."""
        self.counters.resume()
        self._publish(force=True)
        while not self._stopping:
            wait_s(self.step())
        self.server.close()
        self._publish(force=True)
        for file in self._taken:
            file.close()

    def step(self) -> float:
        """Write a batch of every shard; return how long to wait (s) before the next step."""
        try:
            busy = [follower for follower in self.followers if follower.fetch()]
            for follower in busy:
                if monotonic_s() < self.server.due_s or not follower.send():
                    return WAITING_S
                self._publish()
            if (gone_s := self.server.returned()) is not None:
                for follower in self.followers:
                    follower.rewind(gone_s - self.server.target.again / 1000)
        except (DiskFull, Unavailable) as error:  # nothing is lost: the mark stays where it is
            self.counters.add("errors_total", stage="disk_full" if isinstance(error, DiskFull) else "log")
            self.counters.warn(str(error))
            return TROUBLE_S
        finally:
            self._publish()
        return 0.0 if busy else IDLE_S

    def _publish(self, *, force: bool = False) -> None:
        now_ms = self._clock.now_ms()
        waiting = [at for follower in self.followers if (at := follower.waits_since) is not None]
        self.counters.gauges["influx_lag_s"] = max(now_ms - min(waiting, default=now_ms), 0) / 1000
        self.counters.gauges["influx_answers"] = 0.0 if self.server.trouble else 1.0
        self.counters.details["server"] = self.server.trouble or "answers"
        self.counters.details["shards"] = {str(each.shard): {"offset": each.mark.offset} for each in self.followers}
        self.counters.publish(force=force)


# --- command line ---------------------------------------------------------------------------------------------------


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="where the values go (default: DATA/influx.yaml)")
    parser.add_argument("--check", action="store_true", help="check the configuration and its token, and end")
    parser.add_argument("--shards", metavar="LIST", help="shards to take, such as 0,1 (default: all of the run)")
    add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    target = read_target(args.config or layout.root / "influx.yaml")
    read_token(target, layout.secrets)
    if args.check:
        emit({"target": target.name, "batch": target.batch}, as_json=args.json)
        return 0
    layout.make()
    run = layout.read_run()
    place = open_place(args, layout, run.shards)
    process = InfluxProcess(place, run, parse_shards(args.shards, run.shards), target)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.stop)
    process.run()
    return 0


command = Subcommand("write the log's values to InfluxDB, for Grafana and third parties", _arguments, _run)
