"""`citybrain worker`: the process between the log and the transition log; one `ShardWorker` a shard."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

from citybrain.cli import Subcommand
from citybrain.clock import wait_s
from citybrain.counters import Counters, process_name
from citybrain.errors import UsageError
from citybrain.layout import Layout, Run
from streams.logs import LogStore
from streams.runtimes.ingest import parse_shards, take_shard
from streams.runtimes.shard_worker import ShardWorker, publish
from streams.runtimes.stores import Place, add_arguments, open_place
from streams.warm import warm_engine

SNAPSHOT_S = 30.0
IDLE_S = 0.02


class WorkerProcess:
    """The loop over all shards of this process. `run` returns when `stop` has been called.

    Two writers would spoil a transition log, so every shard is taken before anything else; raises Unavailable.
    """

    def __init__(
        self,
        layout: Layout,
        run: Run,
        shards: Sequence[int],
        snapshot_s: float = SNAPSHOT_S,
        logs: LogStore | None = None,
    ) -> None:
        self._taken = [take_shard(layout, "worker", shard) for shard in shards]
        self.counters = Counters(process_name("worker", shards, run.shards), layout.run)
        self.shards = [ShardWorker(shard, layout, self.counters, snapshot_s, logs=logs) for shard in shards]
        self._clock = run.clock
        self._stopping = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Recover, then serve until stopped; raises StorageError where the disk fails."""
        last = self.counters.resume()
        self.counters.publish(force=True)
        warm_engine()
        for shard in self.shards:
            shard.start()
            if last is not None:
                shard.known = last.details.get("shards", {}).get(str(shard.shard), {}).get("offset", 0)
        while not self._stopping:
            busy = [shard.step() for shard in self.shards]
            self._measure()
            self._publish()
            if not any(busy):
                wait_s(IDLE_S)
        for shard in self.shards:
            shard.stop()
        self._publish(force=True)
        for file in self._taken:
            file.close()

    def _measure(self) -> None:
        """Count how long what was just taken had waited; each record as long as the oldest of its batch."""
        now_ms = self._clock.now_ms()
        for shard in self.shards:
            if shard.taken is not None:
                oldest_at, amount = shard.taken
                self.counters.delayed("lag_s", self._clock.real_s(now_ms - oldest_at), amount)

    def _publish(self, *, force: bool = False) -> None:
        publish(self.counters, self.shards, self._clock.now_ms(), force=force)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", metavar="LIST", help="shards to take, such as 0,1 (default: all of the run)")
    parser.add_argument("--snapshot-s", type=float, default=SNAPSHOT_S, help="seconds between snapshots (default: 30)")
    add_arguments(parser)
    parser.add_argument(
        "--runtime",
        choices=("embedded", "kafka", "faust"),
        default="embedded",
        help="who deals out the shards: --shards (default), Kafka's group protocol, or Faust",
    )
    parser.add_argument("--name", default="worker", help="with another runtime: what this process is called")
    parser.add_argument(
        "--session-s", type=float, default=10.0, help="... and after how long a silent one loses its shards"
    )


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    layout.make()
    run = layout.read_run()
    place = open_place(args, layout, run.shards)
    if args.runtime != "embedded":
        return _run_dealt(args, place, run)
    _serve(WorkerProcess(place.layout, run, parse_shards(args.shards, run.shards), args.snapshot_s, place.logs))
    return 0


class Stoppable(Protocol):
    """A loop that a signal ends."""

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None: ...
    def run(self) -> None: ...


def _serve(process: Stoppable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.stop)
    process.run()


def _run_dealt(args: argparse.Namespace, place: Place, run: Run) -> int:
    """Take the shards that Kafka or Faust deals out; raises UsageError."""
    if args.log != "kafka" or args.shards is not None:
        raise UsageError(f"--runtime {args.runtime}: it needs --log kafka, and the shards are dealt out (no --shards)")
    if args.runtime == "faust":
        from streams.runtimes.kafka.faust_worker import FaustWorker  # noqa: PLC0415  only who asks for it needs Faust

        FaustWorker(args.kafka, place, run, args.snapshot_s, args.name, args.session_s).run()
    else:
        from streams.runtimes.kafka.group_worker import GroupWorker  # noqa: PLC0415

        _serve(GroupWorker(place, run, args.snapshot_s, args.name, args.session_s))
    return 0


command = Subcommand("detect: read the log, write transitions", _arguments, _run)
